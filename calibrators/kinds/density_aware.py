"""density_aware: rows far from what the model was made on get a higher temperature.

Tomani, Waseda, Shen, Cremers, "Beyond In-Domain Scenarios: Robust Density-Aware Calibration", ICML 2023. With s_l(x)
the distance of x, in layer l, to its k-th nearest neighbour in a reference set, logits become z / S(x) and go through
any other calibrator (`base`). Three links between distances and S:

    linear            S = max(w0 + sum_l w_l s_l, 1e-20)          s_l squared; equations (3), (4) of the paper
    anchored_hinge    S = T0 exp(sum_l w_l h_l) G                 h_l = max(0, z_l - 1)
    anchored_power    S = T0 prod_l (1 + h_l)^w_l G

`linear` with normalise="l2", loss="mse" is what is published. The anchored ones start from T0, the temperature of the
ordinary rows, and z_l = (s_l - mean) / deviation over these: up to one deviation beyond the mean nothing changes, so
they cost next to nothing where the model is at home. w >= 0 everywhere, by bounded L-BFGS with analytic gradients.

What decides is not the formula but the calibration rows: ordinary rows hold no example of "far, and too sure", so every
w may come out as zero, which is temperature scaling, and `notes` says so. `shifted` marks rows that were drawn from
elsewhere or distorted with their labels kept (`calibrators.augment` makes such images).

G = max(1, max_l s_l / far_l)^2 with far_l `FAR` times the largest distance in the calibration set: no row of it is
touched. Beyond, where a ReLU network's logits grow like the distance, z / S falls like its inverse and probabilities
go to 1 / n_classes, whatever the weights. An L2-normalised distance is bounded and promises nothing of the kind.

Two further outputs: `ood_score`, the mean z_l of the layers that are read, and `density`, the share of ordinary
calibration rows whose score is higher, 1 at home and 0 beyond all of them.

The reference is a constant of the graph, or, above `SWITCH` numbers, an index beside it (`calibrators.index`): the
graph gives the features, the index their distances, and a second graph goes on from there. An export always compares
with all of the reference, inside its one graph.

The authors' code takes the nearest neighbour where the paper says the k-th (it reads column -k of k columns); both are
here. `docs/kinds/density_aware.md` has what each choice is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
from scipy.optimize import minimize

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.index import FORMS, TOGETHER, Index, is_installed
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.layers import LOGITS, Layer
from calibrators.neighbours import FARTHEST, centres_of_clusters, drawn_rows, emit_nearest, nearest, own_rows
from calibrators.numerics import MAX_ABS_LOGIT, Array, centre, log_softmax, softmax_of_centred
from calibrators.registry import create
from calibrators.training import distinct

LINKS = ("anchored_hinge", "anchored_power", "linear")
DISTANCES = ("kth", "nearest", "mean")
LOSSES = ("log_loss", "mse")
COMPRESSIONS = ("sample", "clusters")
CROSS_VALIDATION = "cross_validation"

FAR = 2.0
LEAST_SCALE = 1e-30
LEAST_DEVIATION = 1e-6
LEAST_SUM = 1e-20
MOST_LOG_SUM = 80.0
MOST_WEIGHT, MOST_OFFSET = 1e4, 100.0
STRENGTHS = (*np.geomspace(0.3, 0.001, 18).tolist(), 0.0)
"""Of the L1 penalty, among which cross-validation chooses."""
FOLDS = 5
RANKS = 128
ROWS_PER_CLUSTER = 16
MOST_NUMBERS = 1 << 27
"""Of a reference in a graph, rows times columns: it is one message of less than 2 GiB, and a runtime holds float32."""
SWITCH = 1 << 24
"""Of a reference beyond which `auto` is an index of lists."""
ROWS_TRIED = 256
"""Calibration rows by which it is found how much an index must look at; all of them then confirm it."""
BLOCK = 1 << 10
"""Rows of a reference that are read at once: what is made of them stays in the processor's cache."""
FLOAT16_MOST = 6e4
LEAST_LENGTH, LEAST_WEIGHT, LEAST_RAMP = 1e-10, 1e-9, 0.1
BASE, INDEX = "base/", "index/"
OWN = ("anchor", "weights", "kept", "means", "deviations", "far", "centre", "scale", "reference", "k", "ranks")


class DensityAware(Calibrator):
    """p = base(z / S(x)), S from distances to a reference set in some layers. Keeps the argmax if the base does.

    Parameters
    ----------
    layers : names of the model's tensors, `logits` for the logits themselves; None: on a model those that
        `calibrators.layers` finds, in the library alone the logits
    widths : columns of each of `layers` but the logits, in `features=` side by side; the server fills them in
    link : anchored_hinge, anchored_power or linear
    distance : kth, nearest, or mean (of the k nearest)
    k : of the neighbours; no more than the reference has
    normalise : l2, each row to unit length, or none
    loss : that the weights minimise, log_loss or mse; None: mse for linear, as published, else log_loss
    ridge : strength of the penalty ridge/2 |w|^2 of the anchored links, which shares the weight among layers
    l1 : strength of a penalty sum_l w_l, or `cross_validation` for the largest that costs at most a standard error;
        layers whose weight it makes zero are not read when serving, the others' are weighed again without it
    base, base_params : a kind, and its parameters, fitted on z / S; None: the softmax
    reference_rows : most rows of the reference that are kept
    compression : how, where there are more: a sample, or the centres of that many clusters
    seed : of the sample or the clusters
    index : where distances come from when serving: graph, or of `calibrators.index` exact, ivf, hnsw; auto is the graph
        up to `SWITCH` numbers and lists (ivf) above
    index_tolerance : most that an index may change a probability of the calibration rows; it looks at more of the
        reference until it does not, and the fit is refused if it cannot

    Attributes
    ----------
    anchor_ : () float64, T0, or w0 of the linear link
    weights_, means_, deviations_, far_, scale_ : (n_kept,) float64, of the layers that are read
    kept_ : (n_kept,) int64, which of `layers` these are
    centre_ : (n_columns,) float64, taken off the kept layers' columns before they are divided by `scale_`
    reference_ : (n_reference, n_columns) float16
    k_ : () int64
    ranks_ : (RANKS,) float64, quantiles over ordinary calibration rows of the mean z_l
    index_ : the index beside the graph, or None

    Examples
    --------
    Of rows with the same logits those far out are right half as often, and the calibrator has seen some.

    >>> rng = np.random.default_rng(0)
    >>> logits, shifted = np.tile([[0.0, 4.0]], (400, 1)), np.arange(400) >= 200
    >>> features = rng.normal(size=(400, 2)) * np.where(shifted, 9, 1)[:, None]
    >>> y = np.where(shifted, np.arange(400) % 2, np.arange(400) % 20 > 0)
    >>> calibrator = DensityAware(layers=["f"], widths=[2])
    >>> calibrator = calibrator.fit(logits, y, features=features, shifted=shifted)
    >>> calibrator.predict_proba(logits[:3], features=[[0, 0], [4, 0], [1e9, 0]])[:, 1].round(2).tolist()
    [0.95, 0.71, 0.5]
    """

    learned = OWN
    fit_reads = frozenset({"reference", "shifted"})
    float32_atol = 1e-4
    index_: Index | None

    def __init__(
        self,
        layers: list[str] | None = None,
        widths: list[int] | None = None,
        link: str = "anchored_hinge",
        distance: str = "kth",
        k: int = 10,
        normalise: str = "none",
        loss: str | None = None,
        ridge: float = 0.3,
        l1: float | str = 0.0,
        base: str | None = None,
        base_params: dict[str, Any] | None = None,
        reference_rows: int = 2048,
        compression: str = "sample",
        seed: int = 0,
        index: str = "auto",
        index_tolerance: float = 0.01,
    ) -> None:
        self.layers = layers
        self.widths = widths
        self.link = link
        self.distance = distance
        self.k = k
        self.normalise = normalise
        self.loss = loss
        self.ridge = ridge
        self.l1 = l1
        self.base = base
        self.base_params = base_params
        self.reference_rows = reference_rows
        self.compression = compression
        self.seed = seed
        self.index = index
        self.index_tolerance = index_tolerance

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "features"} if self.taps else {"logits"})

    def signal_shapes(self, n_classes: int) -> dict[str, tuple[int, ...]]:
        del n_classes
        if not self.taps:
            return {}
        if self.widths is None:
            raise ValueError(f"widths must say how many columns each of {', '.join(self.taps)} has")
        return {"features": (sum(self.widths),)}

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(name for name in self.layers or [] if name != LOGITS)

    @property
    def further_outputs(self) -> tuple[str, ...]:
        return ("density", "ood_score")

    @property
    def has_index(self) -> bool:
        return self.index_ is not None

    def stage_shapes(self, n_classes: int) -> dict[str, tuple[int, ...]]:
        return {"distances": self.kept_.shape} if self.has_index else self.signal_shapes(n_classes)

    def look_up(self, logits: Array, **signals: Array) -> dict[str, Array]:
        if not self.has_index:
            return signals
        with np.errstate(invalid="ignore"):  # a row that is no number spoils itself alone
            return {"distances": self._distances(self._vectors(logits, **signals))}

    def on_model(self, layers: Callable[[Sequence[str] | None], Sequence[Layer]]) -> Self:
        chosen = layers(self.layers)
        params = {"layers": [layer.tensor for layer in chosen],
                  "widths": [layer.width for layer in chosen if layer.tensor != LOGITS]}  # fmt: skip
        return type(self)(**(self.get_params(deep=False) | params))

    def check_params(self) -> None:
        _check_layers(self.layers, self.widths, self.taps)
        for name, known in (("link", LINKS), ("distance", DISTANCES), ("normalise", ("l2", "none")),
                            ("loss", (None, *LOSSES)), ("compression", COMPRESSIONS),
                            ("index", ("auto", "graph", *FORMS))):  # fmt: skip
            if (got := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {got!r}")
        for name, least in (("k", 1), ("reference_rows", 2), ("seed", 0)):
            if not _is_whole(got := getattr(self, name)) or got < least:
                raise ValueError(f"{name} must be a whole number, {least} or above, got {got!r}")
        if self.l1 != CROSS_VALIDATION and not _is_penalty(self.l1):
            raise ValueError(f"l1 must be a number, 0 or above, or {CROSS_VALIDATION}, got {self.l1!r}")
        if not _is_penalty(self.ridge):
            raise ValueError(f"ridge must be a number, 0 or above, got {self.ridge!r}")
        if not _is_penalty(self.index_tolerance):
            raise ValueError(f"index_tolerance must be a number, 0 or above, got {self.index_tolerance!r}")
        base = self._new_base()
        if base is not None and base.needs != {"logits"}:
            raise ValueError(f"base must read the logits alone, {self.base} reads {', '.join(sorted(base.needs))}")

    def _fit(
        self,
        logits: Array,
        y: Array,
        weight: Array,
        features: Array | None = None,
        shifted: Array | None = None,
        reference: Mapping[str, Array] | None = None,
    ) -> None:
        moved = np.zeros(len(y)) if shifted is None else (shifted > 0).astype(np.float64)
        if moved.all():
            raise ValueError("every row is shifted; rows of the ordinary kind are wanted too, to standardise by")
        # Equal rows become one with the sum of their weights: a row given twice is no neighbour of itself.
        signals = {"logits": logits} if features is None else {"logits": logits, "features": features}
        first, weight = distinct(np.column_stack([*signals.values(), y, moved]), weight)
        signals = {name: array[first] for name, array in signals.items()}
        y, ordinary = y[first], moved[first] == 0
        given = {name: array[ordinary] for name, array in signals.items()} if reference is None else reference
        self.index_ = None
        self._embed(given, logits.shape[1])
        x = self._vectors(**signals)
        own = own_rows(np.column_stack(x), self.reference_)
        self.k_ = np.asarray(min(1 if self.distance == "nearest" else self.k, max(1, len(self.reference_) - 1)))
        squared = self._squared(x, own)
        distances = self._summed(squared)
        self._standardise(distances, ordinary, weight)
        scaling = TemperatureScaling().fit(signals["logits"][ordinary], y[ordinary], sample_weight=weight[ordinary])
        self.converged_, self.anchor_ = scaling.converged_, scaling.temperature_
        self._weigh(_Rows(centre(signals["logits"]), y, weight / weight.sum()), distances)
        distances = distances[:, self.kept_]
        self._rank(distances[ordinary], weight[ordinary])
        self._fit_base(signals["logits"], distances, y, weight)
        self._forget_unread(logits.shape[1])
        self._fit_index(signals["logits"], [x[i] for i in self.kept_], own, [squared[i] for i in self.kept_])

    def _predict_proba(self, logits: Array, features: Array | None = None) -> Array:
        return self._from_distances(logits, self._distances(self._vectors(logits, features)))

    def _from_distances(self, logits: Array, distances: Array) -> Array:
        scaled = self._scaled(logits, distances)
        return softmax_of_centred(scaled) if self.base_ is None else self.base_.predict_proba(scaled)

    def _predict_further(self, logits: Array, features: Array | None = None) -> dict[str, Array]:
        score = self._standardised(self._distances(self._vectors(logits, features))).mean(axis=1)
        low, width = self._ramps()
        passed = np.clip((score[:, None] - low.astype(score.dtype)) / width.astype(score.dtype), 0, 1)
        return {"density": 1 - passed.mean(axis=1), "ood_score": score}

    def emit(self, graph: Graph, logits: str, features: str = "", distances: str = "") -> str:
        centred, distances = graph.centre(logits), distances or self._emit_distances(graph, logits, features)
        z = self._emit_standardised(graph, distances)
        self._emit_further(graph, z)
        scaled = graph.node("Div", centred, self._emit_sum(graph, distances, z))
        if self.base_ is None:
            return graph.softmax(scaled)
        return self.base_.emit(graph, graph.node("Max", scaled, graph.constant(-MAX_ABS_LOGIT)))

    def tensors(self) -> dict[str, Array]:
        own = super().tensors()
        base = {} if self.base_ is None else self.base_.tensors()
        own |= {f"{BASE}{name}": array for name, array in base.items()}
        of_index = {} if self.index_ is None else self.index_.tensors()
        return own | {f"{INDEX}{name}": array for name, array in of_index.items()}

    def set_tensors(self, tensors: Mapping[str, Array]) -> Self:
        of_base, of_index = (_below(prefix, tensors) for prefix in (BASE, INDEX))
        own = {name: array for name, array in tensors.items() if not name.startswith((BASE, INDEX))}
        base = self._new_base()
        if base is None and of_base:
            raise ValueError(f"without a base there are no tensors {sorted(of_base)}")
        if base is not None:
            base.set_tensors(of_base)
            if "n_classes" in own and not np.array_equal(of_base["n_classes"], own["n_classes"]):
                raise ValueError("the base was fitted on another number of classes")
        super().set_tensors(own)
        self.base_, self.index_ = base, None
        if of_index:
            self.index_ = Index.from_tensors(of_index, self.reference_, self._columns(self.n_classes_))
        return self

    @property
    def notes(self) -> list[str]:
        said = [*super().notes, *getattr(self, "index_notes_", [])]
        if hasattr(self, "weights_") and not self.weights_.any():
            said.append(
                "every weight is zero: this is plain temperature scaling, but for rows far beyond the calibration set; "
                "give it rows that are shifted (`shifted`, or `augment` for images)"
            )
        return said

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        n_layers = len(self.layers or [LOGITS])
        kept = tensors["kept"]
        if kept.dtype != np.int64 or kept.ndim != 1 or not np.isin(kept, range(n_layers)).all():
            raise ValueError(f"kept must be some of the {n_layers} layers, got {kept.tolist()}")
        if not len(kept) or (np.diff(kept) <= 0).any():
            raise ValueError(f"kept must be in rising order, got {kept.tolist()}")
        width = sum(self._widths(n_classes)[layer] for layer in kept)
        for name in ("weights", "means", "deviations", "far", "scale"):
            check_tensor(name, tensors[name], np.float64, kept.shape)
        check_tensor("anchor", tensors["anchor"], np.float64, ())
        check_tensor("centre", tensors["centre"], np.float64, (width,))
        check_tensor("ranks", tensors["ranks"], np.float64, (RANKS,))
        check_tensor("reference", tensors["reference"], np.float16, (len(tensors["reference"]), width))
        check_tensor("k", tensors["k"], np.int64, ())
        if not 1 <= tensors["k"] <= len(tensors["reference"]):
            raise ValueError(f"k must lie in 1..{len(tensors['reference'])}, got {tensors['k']}")
        if not (tensors["weights"].min() >= 0 and tensors["deviations"].min() > 0 and tensors["scale"].min() > 0):
            raise ValueError("weights must not be negative, deviations and scales must be positive")
        if self.link != "linear" and not (tensors["anchor"] > 0 and tensors["far"].min() > 0):
            raise ValueError("the temperature and the distances that count as far must be positive")

    # --- What is read of a row. ---

    def _widths(self, n_classes: int) -> list[int]:
        """Columns of each of `layers`."""
        tapped = iter(self.widths or [])
        return [n_classes if name == LOGITS else next(tapped) for name in self.layers or [LOGITS]]

    def _columns(self, n_classes: int) -> list[slice]:
        """Where the kept layers stand in the centre and in the reference, one after the other."""
        ends = np.cumsum([self._widths(n_classes)[layer] for layer in self.kept_]).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _raw(self, logits: Array, features: Array | None = None) -> list[Array]:
        """The vectors of each kept layer. Logits lose their row's mean, which says nothing."""
        widths, start, raw = self._widths(logits.shape[1]), 0, []
        for name, width in zip(self.layers or [LOGITS], widths, strict=True):
            if name == LOGITS:
                raw.append(logits - logits.mean(axis=1, keepdims=True))
            else:
                assert features is not None  # noqa: S101  # `signal_shapes` names them
                raw.append(features[:, start : start + width])
                start += width
        return [raw[layer] for layer in self.kept_]

    def _vectors(self, logits: Array, features: Array | None = None) -> list[Array]:
        """The same in the units of the reference."""
        vectors = []
        for x, columns, scale in zip(
            self._raw(logits, features), self._columns(logits.shape[1]), self.scale_, strict=True
        ):
            x = _unit(x) if self.normalise == "l2" else x
            with np.errstate(over="ignore"):
                x = (x - self.centre_[columns].astype(x.dtype)) / x.dtype.type(scale)
            vectors.append(np.clip(x, -FARTHEST, FARTHEST))
        return vectors

    def _distances(self, vectors: list[Array]) -> Array:
        """s, (n_samples, n_kept)."""
        return self._summed(self._squared(vectors))

    def _squared(self, vectors: list[Array], own: Array | None = None) -> list[Array]:
        """Of each kept layer (n_samples, k), in rising order."""
        k, index = int(self.k_), self.index_
        if index is not None:
            return [index.nearest(layer, x, k, own) for layer, x in enumerate(vectors)]
        columns = np.cumsum([0, *(x.shape[1] for x in vectors)])
        reference = [self.reference_[:, i:j] for i, j in pairwise(columns.tolist())]
        return [nearest(x, r, k, own) for x, r in zip(vectors, reference, strict=True)]

    def _summed(self, squared: list[Array]) -> Array:
        each = squared if self.link == "linear" else [np.sqrt(d) for d in squared]
        return np.column_stack([d.mean(axis=1) if self.distance == "mean" else d[:, -1] for d in each])

    def _emit_distances(self, graph: Graph, logits: str, features: str) -> str:
        if self.reference_.size > MOST_NUMBERS:
            raise ValueError(
                f"a graph holds at most {MOST_NUMBERS} numbers of a reference, this one has {self.reference_.size} and "
                "is served by an index beside the graph; for one file fit with fewer reference_rows"
            )
        starts = np.cumsum([0, *(self.widths or [])])
        distances = []
        names = self.layers or [LOGITS]
        for layer, columns, scale in zip(self.kept_, self._columns(self.n_classes_), self.scale_, strict=True):
            if names[layer] == LOGITS:
                x = graph.node("Sub", logits, graph.reduce("ReduceMean", logits))
            else:
                i = self.taps.index(names[layer])
                x = graph.node("Gather", features, graph.constant(np.arange(starts[i], starts[i + 1])), axis=1)
            if self.normalise == "l2":
                x = _emit_unit(graph, x)
            x = graph.node("Sub", x, graph.constant(self.centre_[columns]))
            x = graph.node("Div", x, graph.constant(float(scale)))
            x = graph.node("Min", graph.node("Max", x, graph.constant(-FARTHEST)), graph.constant(FARTHEST))
            averaged = self.distance == "mean"
            squared = emit_nearest(graph, x, self.reference_[:, columns], int(self.k_), only_last=not averaged)
            s = squared if self.link == "linear" else graph.node("Sqrt", squared)
            distances.append(graph.reduce("ReduceMean", s) if averaged else s)
        return graph.node("Concat", *distances, axis=1)

    # --- From distances to S. ---

    def _standardised(self, distances: Array) -> Array:
        z: Array = (distances - self.means_.astype(distances.dtype)) / self.deviations_.astype(distances.dtype)
        return z

    def _basis(self, distances: Array) -> Array:
        """What the weights multiply, (n_samples, n_kept)."""
        if self.link == "linear":
            return distances
        h: Array = np.maximum(self._standardised(distances) - 1, 0)
        return h if self.link == "anchored_hinge" else np.log1p(h)

    def _log_sum(self, distances: Array) -> Array:
        """log S, (n_samples, 1)."""
        terms = (self._basis(distances) * self.weights_.astype(distances.dtype)).sum(axis=1, keepdims=True)
        if self.link == "linear":
            total: Array = np.maximum(terms + distances.dtype.type(self.anchor_), LEAST_SUM)
            return np.log(total)
        ratio = (distances / self.far_.astype(distances.dtype)).max(axis=1, keepdims=True)
        log_guard = 2 * np.log(np.maximum(ratio, 1))
        bounded: Array = np.minimum(terms + log_guard + distances.dtype.type(np.log(self.anchor_)), MOST_LOG_SUM)
        return bounded

    def _scaled(self, logits: Array, distances: Array) -> Array:
        """(z - max z) / S; a base is fitted on it and reads it."""
        with np.errstate(over="ignore"):  # minus infinity is a probability of zero
            scaled: Array = centre(logits) / np.exp(self._log_sum(distances))
        return scaled if self.base is None else np.maximum(scaled, scaled.dtype.type(-MAX_ABS_LOGIT))

    def _emit_standardised(self, graph: Graph, distances: str) -> str:
        means, deviations = graph.parameter("means", self.means_), graph.parameter("deviations", self.deviations_)
        return graph.node("Div", graph.node("Sub", distances, means), deviations)

    def _emit_sum(self, graph: Graph, distances: str, z: str) -> str:
        """S, FLOAT [B, 1]."""
        weights = graph.parameter("weights", self.weights_)
        if self.link == "linear":
            terms = graph.reduce("ReduceSum", graph.node("Mul", distances, weights))
            total = graph.node("Add", terms, graph.parameter("anchor", self.anchor_))
            return graph.node("Max", total, graph.constant(LEAST_SUM))
        one, zero = graph.constant(1.0), graph.constant(0.0)
        h = graph.node("Max", graph.node("Sub", z, one), zero)
        if self.link == "anchored_power":
            h = graph.node("Log", graph.node("Add", h, one))
        terms = graph.reduce("ReduceSum", graph.node("Mul", h, weights))
        ratio = graph.reduce("ReduceMax", graph.node("Div", distances, graph.parameter("far", self.far_)))
        log_guard = graph.node("Mul", graph.node("Log", graph.node("Max", ratio, one)), graph.constant(2.0))
        log_anchor = graph.parameter("log_anchor", np.log(self.anchor_))
        total = graph.node("Add", graph.node("Add", terms, log_guard), log_anchor)
        return graph.node("Exp", graph.node("Min", total, graph.constant(MOST_LOG_SUM)))

    def _emit_further(self, graph: Graph, z: str) -> None:
        score = graph.reduce("ReduceMean", z)
        low, width = (graph.parameter(name, a) for name, a in zip(("low", "width"), self._ramps(), strict=True))
        passed = graph.node("Div", graph.node("Sub", score, low), width)
        one = graph.constant(1.0)
        passed = graph.node("Min", graph.node("Max", passed, graph.constant(0.0)), one)
        share = graph.node("Sub", one, graph.reduce("ReduceMean", passed, keepdims=False))
        graph.further("density", share)
        graph.further("ood_score", graph.reshape(score, (-1,)))

    def _ramps(self) -> tuple[Array, Array]:
        """Between two ranks the density falls evenly, over `LEAST_RAMP` at least: it has no steps."""
        return self.ranks_[:-1], np.maximum(np.diff(self.ranks_), LEAST_RAMP)

    # --- The fit. ---

    def _embed(self, reference: Mapping[str, Array], n_classes: int) -> None:
        """Choose the reference's rows, and the units in which each layer's distances are taken."""
        sampled = self.compression == "sample"
        most = self.reference_rows if sampled else ROWS_PER_CLUSTER * self.reference_rows
        chosen = drawn_rows(len(reference["logits"]), most, self.seed)
        self.kept_ = np.arange(len(self._widths(n_classes)))
        widths = self._widths(n_classes)
        self._check_size(min(len(chosen), self.reference_rows) * sum(widths))
        blocks = [chosen[start : start + BLOCK] for start in range(0, len(chosen), BLOCK)]

        def read(of: Callable[..., list[Array]]) -> Iterator[Array]:
            for block in blocks:
                yield np.column_stack(of(**{name: np.asarray(a[block], np.float64) for name, a in reference.items()}))

        self.centre_, self.scale_ = np.zeros(sum(widths)), np.ones(len(widths))
        if self.normalise == "none":
            self.centre_ = sum(x.sum(axis=0) for x in read(self._raw)) / np.float64(len(chosen))
            variance = sum(np.square(x - self.centre_).sum(axis=0) for x in read(self._raw)) / np.float64(len(chosen))
            of_layers = np.split(variance, np.cumsum(widths)[:-1])
            self.scale_ = np.maximum([np.sqrt(of_layer.mean()) for of_layer in of_layers], LEAST_SCALE)
        stored = np.float16 if sampled or len(chosen) <= self.reference_rows else np.float32
        scaled = np.empty((len(chosen), sum(widths)), stored)
        for i, x in enumerate(read(self._vectors)):
            scaled[i * BLOCK : (i + 1) * BLOCK] = np.clip(x, -FLOAT16_MOST, FLOAT16_MOST)
        if len(scaled) > self.reference_rows:
            scaled = centres_of_clusters(scaled, self.reference_rows, self.seed)
        self.reference_ = scaled.astype(np.float16, copy=False)

    def _check_size(self, n_numbers: int) -> None:
        """Refuse what can be served neither by a graph nor by an index."""
        if n_numbers > MOST_NUMBERS and self.index == "graph":
            raise ValueError(
                f"a reference in a graph holds at most {MOST_NUMBERS} numbers, got {n_numbers}: lower reference_rows "
                "or take an index beside it"
            )
        if n_numbers > MOST_NUMBERS and not is_installed():
            raise ValueError(
                f"a reference of more than {MOST_NUMBERS} numbers, here {n_numbers}, needs an index beside the graph: "
                "pip install 'calserve[index]', or lower reference_rows"
            )

    def _fit_index(self, logits: Array, x: list[Array], own: Array, squared: list[Array]) -> None:
        """Make the index, and have it look at as much of the reference as its tolerance asks for."""
        self.index_notes_: list[str] = []
        form = self.index
        if form == "auto":
            form = "ivf" if self.reference_.size > SWITCH and is_installed() else "graph"
        if form == "graph":
            return
        wanted = self._from_distances(logits, self._summed(squared))
        index = self.index_ = Index.build(form, self.reference_, self._columns(logits.shape[1]), seed=self.seed)

        def tried(effort: int, rows: Array) -> tuple[list[Array], float]:
            index.effort = effort
            found = self._squared([vectors[rows] for vectors in x], own[rows])
            return found, float(np.abs(self._from_distances(logits[rows], self._summed(found)) - wanted[rows]).max())

        def suffices(effort: int) -> bool:
            return tried(effort, sample)[1] <= self.index_tolerance

        # An exact search is right by how it works: some rows, too few to be looked up together, say so.
        sample = drawn_rows(len(logits), TOGETHER - 1 if form == "exact" else ROWS_TRIED, self.seed)
        every = sample if form == "exact" else np.arange(len(logits))
        enough = _least_that(suffices, index.effort, index.most_effort)
        found, change = tried(enough, every)
        while change > self.index_tolerance and index.effort < index.most_effort:
            found, change = tried(min(2 * index.effort, index.most_effort), every)
        said = _missed(index, [layer[every] for layer in squared], found, change)
        if change > self.index_tolerance:
            raise ValueError(f"{said}, more than index_tolerance={self.index_tolerance:g}; take index=exact or ivf")
        self.index_notes_ = [said]

    def _standardise(self, distances: Array, ordinary: Array, weight: Array) -> None:
        share = weight[ordinary] / weight[ordinary].sum()
        self.means_ = share @ distances[ordinary]
        self.deviations_ = np.maximum(
            np.sqrt(share @ np.square(distances[ordinary] - self.means_)), LEAST_DEVIATION + 1e-3 * self.means_
        )
        self.far_ = np.maximum(FAR * distances.max(axis=0), LEAST_DEVIATION)

    def _rank(self, distances: Array, weight: Array) -> None:
        """Set the quantiles of the score, over ordinary rows and the layers that are kept."""
        order = np.argsort(score := self._standardised(distances).mean(axis=1))
        share = np.cumsum(weight[order]) / weight.sum()
        at = np.searchsorted(share, np.arange(RANKS) / (RANKS - 1), side="right")
        self.ranks_ = score[order][np.minimum(at, len(order) - 1)]

    def _weigh(self, rows: _Rows, distances: Array) -> None:
        """Set the weights, and keep the layers whose weight is not zero; the last if all are."""
        basis = self._basis(distances)
        chosen = np.arange(distances.shape[1])
        penalty = self._cross_validated(rows, basis) if self.l1 == CROSS_VALIDATION else float(self.l1)
        if penalty:
            _, weights = self._minimise(rows, basis, penalty)
            chosen = np.flatnonzero(weights > LEAST_WEIGHT)
        self.anchor_, found = self._minimise(rows, basis[:, chosen])
        weights = np.zeros(distances.shape[1])
        weights[chosen] = np.where(found > LEAST_WEIGHT, found, 0)
        self.kept_ = np.flatnonzero(weights) if weights.any() else np.array([len(weights) - 1])
        for name, array in (("weights", weights), ("means", self.means_), ("deviations", self.deviations_),
                            ("far", self.far_)):  # fmt: skip
            setattr(self, f"{name}_", array[self.kept_])

    def _minimise(self, rows: _Rows, basis: Array, l1: float = 0.0) -> tuple[Array, Array]:
        """The anchor and the weights of least loss."""
        loss = LOSS[self.loss or ("mse" if self.link == "linear" else "log_loss")]
        n_layers = basis.shape[1]
        if self.link == "linear":
            # The published start, and temperature scaling's: the loss has more than one valley.
            starts = ([1.0] * (n_layers + 1), [min(float(self.anchor_), MOST_OFFSET), *[0.0] * n_layers])
            bounds = [(-MOST_OFFSET, MOST_OFFSET), *[(0, MOST_WEIGHT)] * n_layers]
            ends = [_descend(partial(_linear, loss, rows, basis, l1), start, bounds) for start in starts]
            found = min(ends, key=lambda end: end[1])[0]
            return np.asarray(found[0]), found[1:]
        if not n_layers:
            return self.anchor_, np.zeros(0)
        anchored = rows._replace(logits=rows.logits / self.anchor_)
        ridge = 0.0 if l1 else self.ridge
        bounds = [(0.0, MOST_WEIGHT)] * n_layers
        objective = partial(_anchored, loss, anchored, basis, l1, ridge)
        return self.anchor_, _descend(objective, [0.0] * n_layers, bounds)[0]

    def _cross_validated(self, rows: _Rows, basis: Array) -> float:
        """The largest strength whose loss on rows unseen is within a standard error of the least."""
        fold = np.arange(len(rows.y)) % FOLDS  # of distinct rows in the order of their bytes
        losses = np.empty((len(STRENGTHS), len(rows.y)))
        loss = LOSS[self.loss or ("mse" if self.link == "linear" else "log_loss")]
        for i, strength in enumerate(STRENGTHS):
            for held in range(FOLDS):
                seen, unseen = rows.take(fold != held), rows.take(fold == held)
                anchor, weights = self._minimise(seen, basis[fold != held], strength)
                terms = basis[fold == held] @ weights
                total = np.maximum(terms + anchor, LEAST_SUM) if self.link == "linear" else anchor * np.exp(terms)
                losses[i, fold == held] = loss(unseen.logits / total[:, None], unseen.y)[0]
        mean = losses @ rows.weight
        excess = losses - losses[mean.argmin()]
        error = np.sqrt(np.square(excess - (excess @ rows.weight)[:, None]) @ np.square(rows.weight))
        return float(STRENGTHS[int(np.argmax(mean - mean.min() <= error))])

    def _fit_base(self, logits: Array, distances: Array, y: Array, weight: Array) -> None:
        self.base_ = self._new_base()
        if self.base_ is not None:
            self.base_.fit(self._scaled(logits, distances), y, sample_weight=weight)

    def _forget_unread(self, n_classes: int) -> None:
        """Drop the columns of layers that are not kept."""
        if len(self.kept_) == len(self.scale_):
            return
        starts = np.cumsum([0, *self._widths(n_classes)])
        columns = np.concatenate([np.arange(starts[layer], starts[layer + 1]) for layer in self.kept_])
        self.reference_, self.centre_, self.scale_ = (
            np.take(self.reference_, columns, axis=1),  # row by row in memory, which indexing does not keep
            self.centre_[columns],
            self.scale_[self.kept_],
        )

    def _new_base(self) -> Calibrator | None:
        if self.base is None:
            if self.base_params:
                raise ValueError("base_params are of a base, and none is named")
            return None
        if self.base == "density_aware":
            raise ValueError("base must be another kind")
        return create(self.base, **(self.base_params or {}))


class _Rows(NamedTuple):
    """What the weights are fitted on."""

    logits: Array  # (n_samples, n_classes), less their row's largest
    y: Array
    weight: Array  # (n_samples,) with sum one

    def take(self, chosen: Array) -> _Rows:
        return _Rows(self.logits[chosen], self.y[chosen], self.weight[chosen] / self.weight[chosen].sum())


def _log_loss(scaled: Array, y: Array) -> tuple[Array, Array]:
    """Of each row of z / S, -log p_y and its derivative by log S: a_y - sum_k p_k a_k with a = z / S."""
    log_p = log_softmax(scaled)
    rows = np.arange(len(y))
    return -log_p[rows, y], scaled[rows, y] - np.einsum("ij,ij->i", np.exp(log_p), scaled)


def _mse(scaled: Array, y: Array) -> tuple[Array, Array]:
    """Likewise mean_k (p_k - e_k)^2, and -(2 / K) sum_k p_k (r_k - sum_j p_j r_j) a_k with r = p - e."""
    p = np.exp(log_softmax(scaled))
    residual = p.copy()
    residual[np.arange(len(y)), y] -= 1
    centred = residual - np.einsum("ij,ij->i", p, residual)[:, None]
    return np.square(residual).mean(axis=1), -2 * np.einsum("ij,ij,ij->i", p, centred, scaled) / p.shape[1]


LOSS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {"log_loss": _log_loss, "mse": _mse}


def _linear(loss: Any, rows: _Rows, basis: Array, l1: float, w: Array) -> tuple[float, Array]:
    """Loss and gradient at (w0, w) for S = max(w0 + basis w, LEAST_SUM)."""
    total = w[0] + basis @ w[1:]
    floored = np.maximum(total, LEAST_SUM)
    values, slopes = loss(rows.logits / floored[:, None], rows.y)
    by_total = rows.weight * np.where(total > LEAST_SUM, slopes / floored, 0)
    gradient = np.concatenate([[by_total.sum()], by_total @ basis + l1])
    return float(rows.weight @ values + l1 * w[1:].sum()), gradient


def _anchored(loss: Any, rows: _Rows, basis: Array, l1: float, ridge: float, w: Array) -> tuple[float, Array]:
    """Loss and gradient at w for S = exp(basis w), the logits being divided by T0 already."""
    terms = np.minimum(basis @ w, MOST_LOG_SUM)
    values, slopes = loss(rows.logits * np.exp(-terms)[:, None], rows.y)
    gradient = (rows.weight * slopes) @ basis + l1 + ridge * w
    return float(rows.weight @ values + l1 * w.sum() + ridge / 2 * w @ w), gradient


def _descend(objective: Any, start: list[float], bounds: Any) -> tuple[Array, float]:
    found = minimize(objective, start, jac=True, bounds=bounds, method="L-BFGS-B",
                     options={"ftol": 1e-12, "gtol": 1e-9, "maxiter": 500})  # fmt: skip
    return found.x, float(found.fun)


def _below(prefix: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def _least_that(suffices: Callable[[int], bool], least: int, most: int) -> int:
    """About the smallest whole number that suffices, as larger ones do; `most` where none does."""
    low, high = least - 1, least
    while high < most and not suffices(high):
        low, high = high, min(2 * high, most)
    while high - low > high // 8 + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def _missed(index: Index, squared: list[Array], found: list[Array], change: float) -> str:
    """How the distances of an index differ from the true ones, in words."""
    recall = np.mean([(f <= s[:, -1:] * (1 + 1e-5)).mean() for s, f in zip(squared, found, strict=True)])
    last = [(np.sqrt(s[:, -1]), np.sqrt(f[:, -1])) for s, f in zip(squared, found, strict=True)]
    off = max(float((np.abs(f - s) / np.maximum(s, LEAST_LENGTH)).max()) for s, f in last)
    return (
        f"distances are looked up in an index ({index.form}, effort {index.effort} of {index.most_effort}): it finds "
        f"{recall:.1%} of the neighbours of {len(found[0])} calibration rows, the farthest of them off by at most "
        f"{off:.1%} of its distance, and no probability off by more than {change:.2g}"
    )


def _unit(x: Array) -> Array:
    """Rows of length one; a row of zeros stays. Divided by their largest first: squares overflow."""
    x = x / np.maximum(np.abs(x).max(axis=1, keepdims=True), LEAST_SCALE)
    unit: Array = x / np.maximum(np.sqrt(np.square(x).sum(axis=1, keepdims=True)), LEAST_LENGTH)
    return unit


def _emit_unit(graph: Graph, x: str) -> str:
    largest = graph.reduce("ReduceMax", graph.node("Abs", x))
    x = graph.node("Div", x, graph.node("Max", largest, graph.constant(LEAST_SCALE)))
    length = graph.node("Sqrt", graph.reduce("ReduceSum", graph.node("Mul", x, x)))
    return graph.node("Div", x, graph.node("Max", length, graph.constant(LEAST_LENGTH)))


def _check_layers(layers: Any, widths: Any, tapped: Sequence[str]) -> None:
    if layers is not None and not (
        isinstance(layers, list | tuple) and layers and all(isinstance(name, str) for name in layers)
        and len(set(layers)) == len(layers)
    ):  # fmt: skip
        raise ValueError(f"layers must be distinct names of tensors, one or more, got {layers!r}")
    if widths is not None and not (
        isinstance(widths, list | tuple) and len(widths) == len(tapped)
        and all(_is_whole(width) and width > 0 for width in widths)
    ):  # fmt: skip
        raise ValueError(
            f"widths must be {len(tapped)} positive whole numbers, one for each tapped layer, got {widths!r}"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_penalty(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < np.inf
