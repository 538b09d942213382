"""The interface of a calibrator.

A fitted calibrator is one flat dict of arrays with three jobs: the tensors of its artifact, the overridable
initializers of the fused graph, and what an online update swaps. `tensors` reads that dict, `set_tensors` writes it.

A kind is one file in `calibrators/kinds/` holding one subclass; the filename is the kind's name everywhere. The
contract that each must keep is a test: `tests/calibrators/test_contract.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from calibrators.graph import Graph
from calibrators.layers import Layer
from calibrators.numerics import (
    MAX_ABS_LOGIT,
    Array,
    by_blocks,
    check_labels,
    check_logits,
    check_sample_weight,
    check_shape,
    to_numpy,
)


class Calibrator(BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn ships no types
    """Base of every kind: `fit` on logits and labels, `predict_proba` in numpy, `emit` the same arithmetic as ONNX.

    Subclasses implement `_fit`, `_predict_proba` and `emit`, and list the arrays they learn in `learned`. Constructor
    parameters are plain JSON values, stored under their own names (scikit-learn's rule), so that `clone`, `get_params`
    and the artifact work without further code.
    """

    fit_needs: ClassVar[frozenset[str]] = frozenset()
    """Further signals read by `fit` alone."""

    fit_reads: ClassVar[frozenset[str]] = frozenset()
    """What `fit` takes besides, where it is given: shifted, reference."""

    learned: ClassVar[tuple[str, ...]] = ()
    """Attributes set by `_fit`, without the trailing underscore: the tensors of the artifact, beside `n_classes`."""

    float32_atol: ClassVar[float] = 2e-6
    """Largest difference between the float32 graph and a float64 `predict_proba`, for logits within ±100.

    Of a kind that is a step function not of the few rows so near an edge that float32 puts them into the next cell."""

    tensor: str | None = None
    """Of a kind that acts before the model: name of the tensor that it acts on, None for the one that it expects."""

    n_classes_: int

    @property
    def kind(self) -> str:
        """The name on the wire, in artifacts and in logs: the filename."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def needs(self) -> frozenset[str]:
        """Signals read when serving, as the parameters have it: logits, features, inputs, views."""
        return frozenset({"logits"})

    def signal_shapes(self, n_classes: int) -> dict[str, tuple[int, ...]]:
        """What `fit` and `predict_proba` read beside the logits: the name of each signal, the shape of a row of it."""
        del n_classes
        return {}

    @property
    def notes(self) -> list[str]:
        """What this fit has to say of itself."""
        return [] if getattr(self, "converged_", True) else ["the fit has no finite optimum or did not converge"]

    def read_when_serving(self, signals: Mapping[str, Any]) -> dict[str, Any]:
        """Of what a fit is given beside the logits, what `predict_proba` takes."""
        return {name: signals[name] for name in self.signal_shapes(self.n_classes_)}

    @property
    def further_outputs(self) -> tuple[str, ...]:
        """What it computes beside the probabilities: names of `graph.FURTHER_OUTPUTS`."""
        return ()

    @property
    def has_index(self) -> bool:
        """Whether something is looked up beside the graph when serving, between two graphs."""
        return False

    def stage_shapes(self, n_classes: int) -> dict[str, tuple[int, ...]]:
        """What the graph of the calibrator alone reads beside the logits: the signals, or what is looked up by them."""
        return self.signal_shapes(n_classes)

    def look_up(self, logits: Array, **signals: Array) -> dict[str, Array]:
        """The same of rows, from their logits and signals."""
        del logits
        return signals

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the model's tensors whose vectors, side by side, are its `features`."""
        return ()

    def on_model(self, layers: Callable[[Sequence[str] | None], Sequence[Layer]]) -> Self:
        """This calibrator, not fitted, with what it reads of a model written into its parameters.

        `layers` gives the model's layers by the names of their tensors, those that suit best for None; it raises
        ValueError for what the model does not show.
        """
        del layers
        return self

    def fit(
        self,
        logits: ArrayLike,
        y: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        shifted: ArrayLike | None = None,
        reference: Mapping[str, ArrayLike] | None = None,
        **signals: Any,
    ) -> Self:
        """Learn from labelled rows.

        Parameters
        ----------
        logits : (n_samples, n_classes) real; scores before softmax. For probabilities p pass log(p).
        y : (n_samples,) class indices 0 .. n_classes-1
        sample_weight : (n_samples,) not negative; weight two equals the row twice
        shifted : (n_samples,) whether a row is distorted or of another origin than those to come
        reference : signals by name, the logits among them, of rows without labels that others are compared with
        signals : (n_samples, ...) each, those of `signal_shapes`, or what a kind with `fit_needs` says that it takes;
            None is as good as absent

        Raises
        ------
        ValueError, TypeError
            naming what was wrong, what was wanted and what came; the estimator then stays as it was
        """
        self.check_params()
        z = check_logits(logits).astype(np.float64, copy=False)
        labels = check_labels(y, n_samples=len(z), n_classes=z.shape[1])
        weight = check_sample_weight(sample_weight, n_samples=len(z))
        beside = self._check_fit_signals(signals, z)
        apart = self._check_apart(shifted, reference, z)
        if "shifted" in apart:
            beside["shifted"] = apart.pop("shifted")
        present = np.unique(labels[weight > 0])
        if len(present) < 2:
            raise ValueError(
                f"a calibration set needs rows of at least 2 classes, got {len(z)} rows with classes {present.tolist()}"
            )
        kept = weight > 0
        if not kept.all():
            z, labels, weight = z[kept], labels[kept], weight[kept]
            beside = {
                name: values[kept] if hasattr(values, "__getitem__") else values for name, values in beside.items()
            }
        self._fit(z, labels, weight, **beside, **apart)
        self.n_classes_ = z.shape[1]
        return self

    def predict_proba(self, logits: ArrayLike, **signals: ArrayLike | None) -> Array:
        """Calibrated probabilities (n_samples, n_classes): rows sum to one; float32 in, float32 out, else float64.

        Raises
        ------
        NotFittedError
            before `fit`
        ValueError, TypeError
            for logits that are not finite reals of shape (n_samples, n_classes of the fit), and for signals (as `fit`
            takes them) that do not belong to these rows
        """
        self._check_fitted()
        z = check_shape(logits, n_classes=self.n_classes_)
        return by_blocks(self._predict_proba, z, self._check_signals(signals, z))

    def predict_further(self, logits: ArrayLike, **signals: ArrayLike | None) -> dict[str, Array]:
        """The values of `further_outputs`, by name, one row a row of the logits; raises as `predict_proba` does."""
        self._check_fitted()
        z = check_shape(logits, n_classes=self.n_classes_)
        beside = self._check_signals(signals, z)
        return self._predict_further(z, **beside) if self.further_outputs else {}

    @abstractmethod
    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        """Set the learned attributes from checked float64 logits, int64 labels and positive weights.

        A kind with `signal_shapes` takes these by name as well, here, in `_predict_proba` and in `emit`.
        """

    @abstractmethod
    def _predict_proba(self, logits: Array) -> Array:
        """Probabilities from checked logits, in their dtype."""

    def _predict_further(self, logits: Array) -> dict[str, Array]:
        """`further_outputs` from checked logits, and signals by name as `_predict_proba` takes them."""
        del logits
        raise TypeError(f"{self.kind} computes nothing beside the probabilities")

    @abstractmethod
    def emit(self, graph: Graph, logits: str) -> str:
        """Append this calibrator's arithmetic to `graph`; return the name of the FLOAT [B, K] probabilities.

        `logits` names a FLOAT [B, K] tensor. Learned arrays enter by `graph.parameter`, so that another fit of the same
        shape is another feed and not another session. Each of `further_outputs` is named by `graph.further`.
        """

    def emit_sets(self, graph: Graph, probabilities: str) -> None:
        """Name the sets of labels that this calibrator makes of its FLOAT [B, K] probabilities, by `graph.further`.

        A server makes them beside its graph, for the confidence level of each request; a graph by itself has one level.
        """

    def acts_on(self, graph: Graph) -> str:
        """The tensor of a model that `emit_inputs` takes, by default its one input of images (else ValueError)."""
        return graph.image_input()[0]

    def copies(self, inputs: Array) -> Iterator[Array]:
        """What acts before the model: from its input to what further runs of it read, whose logits are the `views`."""
        del inputs
        raise TypeError(f"{self.kind} does not act before the model")

    def emit_inputs(self, graph: Graph, x: str) -> str:
        """Append the same to `graph`: from the model's input `x` to the copies, in one tensor, batch after batch.

        Raises
        ------
        ValueError
            if the model's inputs or its operator set do not allow it
        """
        del graph, x
        raise TypeError(f"{self.kind} does not act before the model")

    def tensors(self) -> dict[str, Array]:
        """The learned arrays by name, `n_classes` among them."""
        self._check_fitted()
        arrays = {name: np.asarray(getattr(self, f"{name}_")) for name in self.learned}
        return arrays | {"n_classes": np.asarray(self.n_classes_, dtype=np.int64)}

    def set_tensors(self, tensors: Mapping[str, Array]) -> Self:
        """Take learned arrays as `tensors` gave them.

        Raises
        ------
        ValueError
            if names are missing or unknown, or an array's dtype, shape or values are not what this kind learns
        """
        wanted = {*self.learned, "n_classes"}
        if set(tensors) != wanted:
            raise ValueError(f"{self.kind} has tensors {sorted(wanted)}, got {sorted(tensors)}")
        self.check_params()
        check_tensor("n_classes", tensors["n_classes"], np.int64, ())
        n_classes = int(tensors["n_classes"])
        if n_classes < 2:
            raise ValueError(f"n_classes must be 2 or more, got {n_classes}")
        self._check_learned(tensors, n_classes)
        for name in self.learned:
            setattr(self, f"{name}_", np.array(tensors[name]))
        self.n_classes_ = n_classes
        return self

    def check_params(self) -> None:
        """Raise ValueError for a constructor parameter outside its range (`create`, `fit` and `set_tensors` ask)."""

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        """Raise ValueError for learned arrays that a fit on `n_classes` classes could not have made."""

    def _check_fit_signals(self, signals: Mapping[str, Any], logits: Array) -> dict[str, Any]:
        """What `_fit` reads beside the logits: by default what is read when serving."""
        return dict(self._check_signals(signals, logits))

    def _check_signals(self, signals: Mapping[str, ArrayLike | None], logits: Array) -> dict[str, Array]:
        """The signals that belong to these logits, in their dtype."""
        given = {name: values for name, values in signals.items() if values is not None}
        shapes = self.signal_shapes(logits.shape[1])
        if given.keys() != shapes.keys():
            read, got = (", ".join(sorted(names)) or "nothing" for names in (shapes, given))
            raise ValueError(f"{self} reads {read} beside the logits, got {got}")
        return {
            name: check_signal(name, values, (len(logits), *shapes[name])).astype(logits.dtype, copy=False)
            for name, values in given.items()
        }

    def _check_apart(
        self, shifted: ArrayLike | None, reference: Mapping[str, ArrayLike] | None, logits: Array
    ) -> dict[str, Any]:
        """What of `fit_reads` is given."""
        given = {name: value for name, value in (("shifted", shifted), ("reference", reference)) if value is not None}
        if unread := given.keys() - self.fit_reads:
            raise ValueError(f"{self.kind} does not read {', '.join(sorted(unread))}")
        if shifted is not None:
            given["shifted"] = check_signal("shifted", np.asarray(to_numpy(shifted), np.float64), (len(logits),))
        if reference is not None:
            given["reference"] = self._check_reference(reference, logits.shape[1])
        return given

    def _check_reference(self, reference: Mapping[str, ArrayLike], n_classes: int) -> dict[str, Array]:
        shapes = {"logits": (n_classes,), **self.signal_shapes(n_classes)}
        if reference.keys() != shapes.keys():
            wanted, got = (", ".join(sorted(names)) or "nothing" for names in (shapes, reference))
            raise ValueError(f"a reference for {self} has {wanted}, got {got}")
        n_rows = len(to_numpy(reference["logits"]))
        if n_rows < 2:
            raise ValueError(f"a reference needs 2 rows or more, got {n_rows}")
        return {
            name: check_signal(f"{name} of the reference", reference[name], (n_rows, *shape))
            for name, shape in shapes.items()
        }

    def _check_fitted(self) -> None:
        if not hasattr(self, "n_classes_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted; call fit(logits, y) first")


def check_signal(name: str, values: ArrayLike, shape: tuple[int, ...]) -> Array:
    """A signal as an array of real, finite numbers of this shape (else TypeError or ValueError)."""
    array = to_numpy(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be real numbers, got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if array.size and not (array.min() >= -MAX_ABS_LOGIT and array.max() <= MAX_ABS_LOGIT):
        raise ValueError(f"{name} must be finite and within ±{MAX_ABS_LOGIT:g}")
    return array


def check_tensor(name: str, array: Array, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a learned array has this dtype and shape and holds finite values."""
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"tensor {name!r} must be {np.dtype(dtype)} of shape {shape}, got {array.dtype} of shape {array.shape}"
        )
    if not np.all(np.isfinite(array)):
        raise ValueError(f"tensor {name!r} holds a value that is not finite")
