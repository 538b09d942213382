"""neural_clamping: one perturbation added to every input, and a temperature.

Tang, Chen, Ho, "Neural Clamping: Joint Input Perturbation and Temperature Scaling for Neural Network Calibration",
TMLR 2024, arXiv 2209.11604: p = softmax(f(x + delta) / T), f the model's logits, delta of the shape of one input and
the same for all. (In spite of the name nothing is clamped.) Fitted on labelled rows, the model as it is, it makes small

    sum_i w_i loss(f(x_i + delta) / T, y_i) + lambda ||delta / s||        sum_i w_i = 1

with loss the log loss or the focal loss -(1 - p_y)^gamma log p_y, by gradient descent through the model
(`calibrators.differentiable`). x may be a tensor behind the inputs, such as the embeddings of ids.

As published, delta starts as noise or a mean gradient, T at 1, and what a fixed number of steps ends with is kept. On a
network that gets what it was trained for, that lowers the loss of the rows it is fitted on and of no others. So here

- delta starts at zero and T where temperature scaling has it; the published starts are a parameter;
- the epoch with the least log loss on a held-out fifth of the rows is taken, the start among them;
- delta is kept only if that log loss is below temperature scaling's by more than `CHANCE` standard errors of the
  difference, and the sum above (with the log loss) on all rows no higher. Otherwise there is no delta and this IS
  temperature scaling, with the same T to the last bit and a graph that runs the model once;
- T is the log loss's, whatever loss shapes delta: the focal loss makes a network unsure that was not;
- s, the deviation of x, makes steps and penalty the same in whatever units x comes: one number for images and
  sequences, one for each column of a table;
- with `axis`, delta is one number for each index along one axis of x, so that of an image's three channels three are
  fitted and not three thousand.

The last is what gains, where inputs are shifted (numbers: `docs/kinds/neural_clamping.md`). `notes` says what became of
delta, with log loss and accuracy of the held-out rows without and with it: unlike a temperature, delta changes answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto

from calibrators.base import Calibrator, check_tensor
from calibrators.differentiable import DifferentiableModel, Rows, exact, site_of
from calibrators.graph import Graph
from calibrators.kinds.temperature import HIGHEST, LOWEST, TemperatureScaling
from calibrators.numerics import Array, centre, log_softmax, softmax_of_centred
from calibrators.training import MIN_ROWS

LOSSES, STARTS = ("log", "focal"), ("zero", "normal", "gradient")
MAX_ROWS, BATCH = 20_000, 128
MAX_EPOCHS, PATIENCE = 60, 8
TEMPERATURE_STEP = 0.002
CHANCE = 2.0
SMALLEST = 1e-7
"""Of 1 - p in the focal loss, whose power may have no slope at zero."""

Progress = Callable[[float, str], None]


class NeuralClamping(Calibrator):
    """p = softmax(f(x + delta) / T), with a delta only where held-out rows show a gain. May change the argmax.

    `fit` takes, beside logits and labels, `inputs` (the model's inputs, rows first: an array, or a dict of them by
    name), `model` (the classifier's ONNX bytes, or a `DifferentiableModel`) and, if wanted, `progress` (called with a
    share and a text). A fit that kept a delta reads `views` (n_samples, 1, n_classes) to predict: the model's logits of
    `copies`, the inputs plus delta. The fused graph makes them itself, by a second run of the model's nodes.

    Parameters
    ----------
    tensor : name of x; None: the model's one input of real numbers
    axis : of x, the batch being 0, along which delta differs; None: along all of them
    loss : "log" or "focal", with exponent `gamma`
    penalty : lambda
    start : of delta: "zero", "normal" (noise of `scale` times s) or "gradient" (the mean of that of the logits' sum)
    learning_rate : length of a step of delta / s, as Adam takes it
    seed : of the held-out fifth, the batches and the noise

    Attributes
    ----------
    temperature_ : () float64
    delta_ : float64 of the shape of one row of x, 1 along dimensions that are open or not `axis`; () where none is kept
    improvement_ : held-out log loss of temperature scaling less that of the best epoch (not stored in the artifact)
    outcome_ : sentences for whoever decides whether to serve it (likewise), shown in `notes`
    converged_ : whether T is an interior optimum (likewise)

    Raises
    ------
    ValueError
        by `fit`, of a model with an operator that is not known, naming it, and of inputs that do not give these logits
    ImportError
        by `fit`, where torch is not installed

    Examples
    --------
    A model that was made for inputs with a first column one lower than what it gets: delta takes that off again.

    >>> from onnx import TensorProto, helper
    >>> io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2]) for name in ("x", "p")]
    >>> graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["p"])], "model", io[:1], io[1:])
    >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(2000, 2))
    >>> y, x = (z + rng.gumbel(size=z.shape)).argmax(axis=1), (z + [1, 0]).astype(np.float32)
    >>> calibrator = NeuralClamping().fit(x, y, inputs=x, model=model.SerializeToString())
    >>> round(float(calibrator.delta_[1] - calibrator.delta_[0]), 1)
    1.0
    >>> views = np.stack(list(calibrator.copies(x)), axis=1)  # of this model the logits of copies are the copies
    >>> calibrator.predict_proba(x, views=views).shape
    (2000, 2)
    """

    fit_needs = frozenset({"input_gradients"})
    learned = ("temperature", "delta")

    def __init__(
        self,
        tensor: str | None = None,
        axis: int | None = None,
        loss: str = "log",
        gamma: float = 1.0,
        penalty: float = 0.01,
        start: str = "zero",
        scale: float = 0.01,
        learning_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.tensor = tensor
        self.axis = axis
        self.loss = loss
        self.gamma = gamma
        self.penalty = penalty
        self.start = start
        self.scale = scale
        self.learning_rate = learning_rate
        self.seed = seed

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "views"} if self._keeps else {"logits"})

    @property
    def notes(self) -> list[str]:
        return [*super().notes, *getattr(self, "outcome_", [])]

    @property
    def _keeps(self) -> bool:
        """Whether it is fitted, and kept a delta."""
        return getattr(self, "delta_", np.asarray(0.0)).ndim > 0

    def signal_shapes(self, n_classes: int) -> dict[str, tuple[int, ...]]:
        return {"views": (1, n_classes)} if self._keeps else {}

    def read_when_serving(self, signals: Mapping[str, Any]) -> dict[str, Any]:
        """The views of the rows whose `inputs` and `model` are given, by the model as a fit differentiates it."""
        if not self._keeps:
            return {}
        model = self._differentiable(signals["model"], self.n_classes_)
        return {"views": Rows.of(model, signals["inputs"]).logits(self.delta_)[:, None]}

    def check_params(self) -> None:
        if not (self.tensor is None or isinstance(self.tensor, str)):
            raise ValueError(f"tensor must be the name of a tensor or None, got {self.tensor!r}")
        for name, known in (("loss", LOSSES), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.axis is not None:
            _check_number("axis", self.axis, whole=True, least=1)
        _check_number("seed", self.seed, whole=True, least=0)
        for name in ("gamma", "penalty", "scale"):
            _check_number(name, getattr(self, name), whole=False, least=0)
        _check_number("learning_rate", self.learning_rate, whole=False, least=1e-6)

    def _check_fit_signals(self, signals: Mapping[str, Any], logits: Array) -> dict[str, Any]:
        given = {name: value for name, value in signals.items() if value is not None}
        progress = given.pop("progress", _silent)
        if given.keys() != {"inputs", "model"}:
            raise ValueError(
                f"{self} is fitted through the model: beside the logits it reads inputs and model, got "
                f"{', '.join(sorted(given)) or 'nothing'}. Logits alone tell no gradient in the inputs"
            )
        model = self._differentiable(given["model"], logits.shape[1])
        rows = Rows.of(model, given["inputs"])
        if len(rows) != len(logits):
            raise ValueError(f"inputs must have {len(logits)} rows, one for each row of logits, got {len(rows)}")
        progress(0.0, f"comparing the differentiated model with {len(rows)} rows of logits, {model.device}")
        rows.verify(logits)
        return {"rows": rows, "progress": progress}

    def _differentiable(self, model: Any, n_classes: int) -> DifferentiableModel:
        if not isinstance(model, DifferentiableModel):
            return DifferentiableModel(model, n_classes, self.tensor)
        if self.tensor not in (None, model.site.tensor):
            raise ValueError(f"{self} moves {self.tensor!r}, the model is differentiated in {model.site.tensor!r}")
        return model

    def _fit(  # type: ignore[override]  # what it reads besides is what `_check_fit_signals` made of it
        self, logits: Array, y: Array, weight: Array, rows: Rows, progress: Progress
    ) -> None:
        given = _Labelled(rows, logits, y, weight / weight.sum())
        plain, labelled = TemperatureScaling().fit(logits, y, sample_weight=weight), given.distinct()
        sought = plain.converged_ and len(labelled.y) >= MIN_ROWS
        found = self._sought(labelled, progress) if sought else None
        self.temperature_, self.delta_, self.converged_ = plain.temperature_, np.asarray(0.0), plain.converged_
        if found is None:
            why = f"fewer than {MIN_ROWS} rows differ" if plain.converged_ else "no finite temperature fits best"
            self.improvement_, self.outcome_ = 0.0, [f"no delta was sought, {why}: this is temperature scaling"]
            return
        self.improvement_ = found.gain
        kept = found.gain > CHANCE * found.error and self._keep(labelled, plain, found)
        self.outcome_ = [found.in_words(kept=kept)]

    def _predict_proba(self, logits: Array, views: Array | None = None) -> Array:
        scores = centre(logits if views is None else views[:, 0])
        with np.errstate(over="ignore"):  # minus infinity is a probability of zero
            scores *= logits.dtype.type(1 / self.temperature_)
        return softmax_of_centred(scores)

    def emit(self, graph: Graph, logits: str, views: str = "") -> str:
        read = graph.reshape(views, (-1, self.n_classes_)) if views else logits
        return graph.softmax(graph.node("Div", graph.centre(read), graph.parameter("temperature", self.temperature_)))

    def copies(self, inputs: Array) -> Iterator[Array]:
        yield inputs + self.delta_.astype(inputs.dtype)

    def acts_on(self, graph: Graph) -> str:
        return site_of(graph.model, self.tensor).tensor

    def emit_inputs(self, graph: Graph, x: str) -> str:
        delta, element = graph.parameter("delta", self.delta_), graph.element_type(x)
        return graph.node("Add", x, delta if element == TensorProto.FLOAT else graph.node("Cast", delta, to=element))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        del n_classes
        check_tensor("temperature", tensors["temperature"], np.float64, ())
        check_tensor("delta", tensors["delta"], np.float64, tensors["delta"].shape)
        if not LOWEST <= tensors["temperature"] <= HIGHEST:
            raise ValueError(f"temperature must lie in {LOWEST:g}..{HIGHEST:g}, got {tensors['temperature']}")
        if np.abs(tensors["delta"]).max() > HIGHEST:
            raise ValueError(f"delta must lie within {HIGHEST:g}")

    def _keep(self, labelled: _Labelled, plain: TemperatureScaling, found: _Found) -> bool:
        """Take what was found, unless log loss and penalty on all rows are more than temperature scaling's log loss."""
        moved = labelled.moved(found.delta)
        clamped = moved.scaling()
        before, after = labelled.log_loss(plain.temperature_), moved.log_loss(clamped.temperature_)
        if not after + self.penalty * np.linalg.norm(found.steps) <= before:
            return False
        self.temperature_, self.delta_, self.converged_ = clamped.temperature_, found.delta, clamped.converged_
        return True

    def _sought(self, labelled: _Labelled, progress: Progress) -> _Found:
        """The epoch with the least log loss on the first fifth of the rows; of two alike the first."""
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(len(labelled.y))[:MAX_ROWS]
        held, training = labelled.take(order[: len(order) // 5]), labelled.take(order[len(order) // 5 :])
        unit = self._unit(training.rows)
        temperature = float(training.scaling().temperature_)
        losses = held.log_losses(temperature)
        best = _Found.of(0, np.zeros(unit.shape), unit, held, losses, temperature)
        for epoch, (steps, learned) in enumerate(self._epochs(training, unit, temperature, rng), start=1):
            best = min(best, _Found.of(epoch, steps, unit, held, losses, learned), key=lambda found: -found.gain)
            progress(epoch / MAX_EPOCHS, f"epoch {epoch} of {MAX_EPOCHS} or fewer, held-out gain {best.gain:.4f}")
            if epoch - best.epoch >= PATIENCE:
                break
        return best

    def _unit(self, rows: Rows) -> Array:
        """s, in delta's shape. Zero where x does not vary: there delta stays zero."""
        site = rows.model.site
        shape = site.shape
        if self.axis is not None:
            if self.axis > len(shape):
                raise ValueError(f"axis must be in 1..{len(shape)} of {site.tensor!r}, got {self.axis}")
            shape = tuple(size if axis == self.axis else 1 for axis, size in enumerate(shape, start=1))
        unit: Array = np.broadcast_to(rows.deviation(), shape).copy()
        return unit

    def _first_steps(self, rows: Rows, unit: Array, rng: np.random.Generator) -> Array:
        """delta / s to start from."""
        if self.start == "normal":
            return self.scale * rng.normal(size=unit.shape)
        if self.start == "zero":
            return np.zeros(unit.shape)
        torch, device = rows.model.torch, rows.model.device
        delta = torch.zeros(unit.shape, requires_grad=True, device=device)
        with exact(torch):
            for piece in rows.pieces():
                rows.logits_of(piece, delta).sum().backward()
        mean = delta.grad.cpu().numpy().astype(np.float64) / len(rows)
        steps: Array = np.divide(mean, unit, out=np.zeros(unit.shape), where=unit > 0)
        return steps

    def _epochs(
        self, training: _Labelled, unit: Array, temperature: float, rng: np.random.Generator
    ) -> Iterator[tuple[Array, float]]:
        """delta / s and T after each epoch."""
        torch, device = training.rows.model.torch, training.rows.model.device
        first = self._first_steps(training.rows, unit, rng)
        steps = torch.tensor(first, dtype=torch.float32, device=device, requires_grad=True)
        log_t = torch.tensor(np.log(temperature), dtype=torch.float32, device=device, requires_grad=True)
        scale = torch.tensor(unit, dtype=torch.float32, device=device)
        of_steps = {"params": [steps], "lr": self.learning_rate / np.sqrt(unit.size)}
        optimiser = torch.optim.Adam([of_steps, {"params": [log_t], "lr": TEMPERATURE_STEP}])
        for _ in range(MAX_EPOCHS):
            order = rng.permutation(len(training.y))
            for start in range(0, len(order), BATCH):
                optimiser.zero_grad()
                (self.penalty * torch.linalg.vector_norm(steps)).backward()
                self._add_gradients(torch, training.take(order[start : start + BATCH]), steps, scale, log_t)
                optimiser.step()
            yield steps.detach().cpu().numpy().astype(np.float64), float(log_t.detach().exp())

    def _add_gradients(self, torch: Any, batch: _Labelled, steps: Any, scale: Any, log_t: Any) -> None:
        """Those of the batch's loss, a piece at a time: the tensors of one piece are kept at once."""
        with exact(torch):
            for piece in batch.rows.pieces():
                logits = batch.rows.logits_of(piece, steps * scale)
                self._loss(torch, logits, log_t, batch.y[piece], batch.weight[piece]).backward()

    def _loss(self, torch: Any, logits: Any, log_t: Any, y: Array, weight: Array) -> Any:
        """A number whose gradient in delta is the loss's, and in T the log loss's."""
        labels = torch.as_tensor(y, device=logits.device)
        cross_entropy = torch.nn.functional.cross_entropy
        of_t = cross_entropy(logits.detach() / log_t.exp(), labels, reduction="none")
        of_delta = cross_entropy(logits / log_t.detach().exp(), labels, reduction="none")
        if self.loss == "focal":
            of_delta = (-torch.expm1(-of_delta)).clamp(min=SMALLEST) ** self.gamma * of_delta
        return torch.as_tensor(weight, dtype=torch.float32, device=logits.device) @ (of_delta + of_t)


class _Labelled(NamedTuple):
    """Labelled rows and the logits they have now."""

    rows: Rows
    logits: Array
    y: Array
    weight: Array

    def take(self, index: Array) -> _Labelled:
        weight = self.weight[index]
        return _Labelled(self.rows[index], self.logits[index], self.y[index], weight / weight.sum())

    def distinct(self) -> _Labelled:
        """Equal rows as one with the sum of their weights, in an order that hangs on their content alone."""
        _, first, index = np.unique(self.rows.digests(self.y), return_index=True, return_inverse=True)
        return self._replace(weight=np.bincount(index, weights=self.weight)[index]).take(first)

    def moved(self, delta: Array) -> _Labelled:
        return self._replace(logits=self.rows.logits(delta).astype(np.float64))

    def scaling(self) -> TemperatureScaling:
        return TemperatureScaling().fit(self.logits, self.y, sample_weight=self.weight)

    def log_losses(self, temperature: Array | float) -> Array:
        losses: Array = -log_softmax(self.logits / temperature)[np.arange(len(self.y)), self.y]
        return losses

    def log_loss(self, temperature: Array | float) -> float:
        return float(self.weight @ self.log_losses(temperature))

    def accuracy(self) -> float:
        return float(self.weight @ (self.logits.argmax(axis=1) == self.y))


@dataclass(frozen=True, eq=False)
class _Found:
    """What the held-out rows say of a delta: log loss and accuracy before and with it, and the error of the gain."""

    epoch: int
    steps: Array
    delta: Array
    log_losses: tuple[float, float]
    accuracies: tuple[float, float]
    error: float

    @classmethod
    def of(cls, epoch: int, steps: Array, unit: Array, held: _Labelled, losses: Array, temperature: float) -> _Found:
        delta = steps * unit
        moved = held.moved(delta) if epoch else held
        gains = losses - moved.log_losses(temperature)
        mean = float(held.weight @ gains)
        error = float(np.sqrt(np.square(held.weight * (gains - mean)).sum()))
        before = float(held.weight @ losses)
        return cls(epoch, steps, delta, (before, before - mean), (held.accuracy(), moved.accuracy()), error)

    @property
    def gain(self) -> float:
        return self.log_losses[0] - self.log_losses[1]

    def in_words(self, *, kept: bool) -> str:
        (loss, loss_after), (accuracy, accuracy_after) = self.log_losses, self.accuracies
        if not self.epoch:
            return f"no delta is kept: none lowered the held-out log loss, {loss:.4f}. This is temperature scaling"
        what = "delta is kept" if kept else "no delta is kept, this is temperature scaling"
        return (
            f"{what}: held-out log loss {loss:.4f} without the best delta, {loss_after:.4f} with it (standard error of "
            f"the difference {self.error:.4f}), accuracy {accuracy:.4f} and {accuracy_after:.4f}"
        )


def _check_number(name: str, value: Any, *, whole: bool, least: float) -> None:
    known = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not known or not least <= value < np.inf:
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number from {least:g} on, got {value!r}")


def _silent(share: float, text: str) -> None:
    del share, text
