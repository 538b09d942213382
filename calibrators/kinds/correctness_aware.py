"""correctness_aware: a small network chooses each row's temperature so that the confidence says how often it is right.

Liu, Wang, Zou, Zou, Zheng, "Optimizing Calibration by Gaining Aware of Prediction Correctness", arXiv 2404.13016, 2024:
p = softmax(z / T(x)), T from a perceptron that is trained on the squared difference

    L = sum_i w_i (max_k p_ik - c_i)^2        c_i: 1 where the argmax is the label, else 0;  sum_i w_i = 1

between confidence and correctness. The label enters by c alone: a row that is wrong is told to be less sure, where the
log loss would have it raise the label. Two forms of x, each of softmax(. / T0) at the row's own `TOP` largest classes:

- own, the default: the row's values themselves, in falling order.
- `views`: the values that the model gives the same classes on transformed copies of the input (`calibrators.views`).
  Where a copy changes the model's mind the row is likelier wrong, which no function of its own logits can know.

T(x) = T0 m(x), with T0 the one temperature that fits best (`temperature`), m = 10^tanh(o), o the output of a hidden
layer of `HIDDEN` ReLU units on standardised x. Three faults of the published code are mended:

- It cuts T off at 0.1 and 10, where the gradient is zero and a bad start is final; tanh ends nowhere.
- Its weights make right and wrong rows count alike, so the best confidence is what it would be if one prediction in two
  were wrong. Trained to the end so, the CIFAR-10 ResNet-50 below has an ECE of .18. Here each row counts once (or its
  weight), and L is least where the confidence is the probability of being right.
- It ends after ten epochs wherever it is. Here Adam (`calibrators.training`) starts at m = 1, temperature scaling, and
  of its epochs the one with the least L on a held-out fifth of the rows is kept, the start among them and only such as
  leave the log loss there no higher than T0 alone. `improvement_` is the fall of L on that fifth.

Fewer than `MIN_ROWS` distinct rows, rows all right or all wrong, or no finite T0 leave m at one.

CIFAR-10 ResNet-50, 5,000 rows to fit and 10,000 to score, T0 alone, then seeds 0 to 4 by the row itself: ECE (15 bins,
percent) 1.37, then .77 to 1.52; log loss .2038, then .1956 to .2043; mean L .0382, then .0360 to .0376; AUC of the
confidence as a guess at correctness .882, then .883 to .909. CIFAR-10 ResNet-20, 1,000 and 2,500 rows, grey, flipped
and rotated copies, means over 8 seeds: L .1083 to .1026 and AUC .868 to .883, but ECE 1.45 to 2.36, log loss .547 to
.555. The row itself gains nothing there (L .1084).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.temperature import HIGHEST, LOWEST, TemperatureScaling
from calibrators.numerics import Array, centre, softmax_of_centred
from calibrators.training import MIN_ROWS, affine, descend, distinct, drawn, hidden_layer, import_torch
from calibrators.views import check_transforms, copies, emit_copies

TOP = 4
HIDDEN = 16
LAYERS = ("weight_1", "bias_1", "weight_2", "bias_2")
LOG_MOST_RATIO = float(np.log(10))
LEAST_SCALE = 0.01
"""Probabilities that differ by less are alike: to magnify them would magnify float32's rounding."""


class CorrectnessAwareTemperature(Calibrator):
    """p = softmax(z / T(x)), T(x) > 0 from a small network. Keeps the argmax. The fit needs torch, serving does not.

    Parameters
    ----------
    views : names of transforms (`calibrators.views.TRANSFORMS`), whose copies the network sees; None: the row itself.
        With names, `fit` and `predict_proba` take `views=` (n_samples, len(views), n_classes), the copies' logits, and
        the fused graph makes them itself, by a second run of a model that has one input of images
    seed : of the network's start and the held-out fifth

    Attributes
    ----------
    temperature_ : () float64, T0
    centre_, scale_ : (n_inputs,) float64, standardise x; n_inputs is min(n_classes, TOP), for each view
    weight_1_, bias_1_, weight_2_, bias_2_ : float64, the layers, (inputs, outputs) and (outputs,)
    improvement_ : held-out loss of T0 alone less this fit's, 0 where T is constant (not stored in the artifact)

    Raises
    ------
    ImportError
        by `fit`, where torch is not installed

    Examples
    --------
    Logits that say .98, and copies of the inputs on which the model holds to its answer or falls for the other class.
    Where it holds it was right 19 times in 20, where it falls one time in two: the logits alone cannot tell.

    >>> logits, holds = np.tile([[0.0, 4.0]], (400, 1)), np.arange(400) < 200
    >>> copies = np.where(holds[:, None], [0.0, 4.0], [4.0, 0.0]) + np.arange(400)[:, None] / 1000 * [1, -1]
    >>> y = np.where(holds, np.arange(400) % 20 > 0, np.arange(400) % 2)
    >>> calibrator = CorrectnessAwareTemperature(views=["flip"]).fit(logits, y, views=copies[:, None])
    >>> calibrator.predict_proba(logits, views=copies[:, None])[[0, 399], 1].round(1).tolist()
    [0.9, 0.6]
    """

    learned = ("temperature", "centre", "scale", *LAYERS)
    float32_atol = 1e-5

    def __init__(self, views: list[str] | None = None, seed: int = 0) -> None:
        self.views = views
        self.seed = seed

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "views"} if self.views else {"logits"})

    def signal_shapes(self, n_classes: int) -> dict[str, tuple[int, ...]]:
        return {"views": (len(self.views), n_classes)} if self.views else {}

    def check_params(self) -> None:
        if self.views is not None:
            check_transforms(self.views)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed must be a whole number, 0 or above, got {self.seed!r}")

    def _fit(self, logits: Array, y: Array, weight: Array, views: Array | None = None) -> None:
        torch = import_torch(self.kind)
        # Equal rows become one with the sum of their weights, and the order of their bytes is the order of all.
        stacked = logits[:, None] if views is None else np.concatenate([logits[:, None], views], axis=1)
        first, weight = distinct(np.column_stack([stacked.reshape(len(y), -1), y]), weight)
        stacked, y = stacked[first], y[first]
        scaling = TemperatureScaling().fit(stacked[:, 0], y, sample_weight=weight)
        self.temperature_, self.improvement_ = scaling.temperature_, 0.0
        rng = np.random.default_rng(self.seed)
        chosen = drawn(len(y), stacked[0].size, rng)
        stacked, y, weight = stacked[chosen], y[chosen], weight[chosen]
        likely = self._likely(stacked[:, 0], None if views is None else stacked[:, 1:])
        self.centre_, self.scale_ = _standardisation(likely, weight)
        layers = [*hidden_layer(likely.shape[1], HIDDEN, rng), np.zeros((HIDDEN, 1)), np.zeros(1)]
        rows = _Rows.of(self._standardised(likely), stacked[:, 0] / scaling.temperature_, y, weight)
        if scaling.converged_ and len(y) >= MIN_ROWS and 0 < rows.correct.sum() < len(y):
            layers, self.improvement_ = _train(torch, layers, rows)
        for name, layer in zip(LAYERS, layers, strict=True):
            setattr(self, f"{name}_", layer)

    def _predict_proba(self, logits: Array, views: Array | None = None) -> Array:
        ratio = self._ratio(self._standardised(self._likely(logits, views)))
        with np.errstate(over="ignore"):  # minus infinity is a probability of zero
            return softmax_of_centred(centre(logits) / (logits.dtype.type(self.temperature_) * ratio))

    def emit(self, graph: Graph, logits: str, views: str = "") -> str:
        named = {name: graph.parameter(name, getattr(self, f"{name}_")) for name in self.learned}
        centred = graph.centre(logits)
        likely = self._emit_likely(graph, centred, views, named["temperature"])
        x = graph.node("Div", graph.node("Sub", likely, named["centre"]), named["scale"])
        hidden = graph.node("Relu", graph.node("Add", graph.node("MatMul", x, named["weight_1"]), named["bias_1"]))
        output = graph.node("Add", graph.node("MatMul", hidden, named["weight_2"]), named["bias_2"])
        power = graph.node("Mul", graph.node("Tanh", output), graph.constant(LOG_MOST_RATIO))
        temperature = graph.node("Mul", named["temperature"], graph.node("Exp", power))
        return graph.softmax(graph.node("Div", centred, temperature))

    def copies(self, inputs: Array) -> Iterator[Array]:
        return copies(inputs, self.views or [])

    def emit_inputs(self, graph: Graph, x: str) -> str:
        return emit_copies(graph, x, self.views or [])

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        n_inputs = min(n_classes, TOP) * len(self.views or [""])
        check_tensor("temperature", tensors["temperature"], np.float64, ())
        shapes = ((n_inputs,), (n_inputs,), (n_inputs, HIDDEN), (HIDDEN,), (HIDDEN, 1), (1,))
        for name, shape in zip(("centre", "scale", *LAYERS), shapes, strict=True):
            check_tensor(name, tensors[name], np.float64, shape)
        if not LOWEST <= tensors["temperature"] <= HIGHEST:
            raise ValueError(f"temperature must lie in {LOWEST:g}..{HIGHEST:g}, got {tensors['temperature']}")
        if not (tensors["scale"].min() >= LEAST_SCALE and tensors["scale"].max() <= 1):
            raise ValueError(f"scales must lie in {LEAST_SCALE:g}..1, got {tensors['scale'].tolist()}")

    def _likely(self, logits: Array, views: Array | None) -> Array:
        """The network's inputs before they are standardised, (n_samples, n_inputs)."""
        n_top = min(logits.shape[1], TOP)
        if views is None:
            p = self._tempered(logits)
            return -np.sort(-np.partition(p, -n_top, axis=1)[:, -n_top:], axis=1)
        top = np.argsort(-logits, axis=1, kind="stable")[:, :n_top]  # the first of equals first, as TopK has it
        each = [np.take_along_axis(self._tempered(views[:, v]), top, axis=1) for v in range(views.shape[1])]
        return np.concatenate(each, axis=1)

    def _emit_likely(self, graph: Graph, centred: str, views: str, temperature: str) -> str:
        n_top = min(self.n_classes_, TOP)
        if not views:
            return graph.largest(graph.softmax(graph.node("Div", centred, temperature)), n_top)
        n_views = len(self.views or [])
        tempered = graph.node("Softmax", graph.node("Div", graph.centre(views), temperature), axis=2)
        n = graph.constant(np.array([n_top], dtype=np.int64))
        top = graph.reshape(graph.nodes("TopK", centred, n, n_outputs=2, axis=1)[1], (-1, 1, n_top))
        of_each = graph.node("Concat", *[top] * n_views, axis=1)
        likely = graph.node("GatherElements", tempered, of_each, axis=2)
        return graph.reshape(likely, (-1, n_views * n_top))

    def _tempered(self, logits: Array) -> Array:
        """softmax(z / T0)."""
        with np.errstate(over="ignore"):  # minus infinity is a probability of zero
            return softmax_of_centred(centre(logits) / logits.dtype.type(self.temperature_))

    def _standardised(self, likely: Array) -> Array:
        x: Array = (likely - self.centre_.astype(likely.dtype)) / self.scale_.astype(likely.dtype)
        return x

    def _ratio(self, x: Array) -> Array:
        """m(x), (n_samples, 1)."""
        weight_1, bias_1, weight_2, bias_2 = (getattr(self, f"{name}_").astype(x.dtype) for name in LAYERS)
        output = affine(np.maximum(affine(x, weight_1, bias_1), 0), weight_2, bias_2)
        ratio: Array = np.exp(np.tanh(output) * x.dtype.type(LOG_MOST_RATIO))
        return ratio


class _Rows(NamedTuple):
    """What training sees, as arrays or as tensors."""

    x: Any  # (n_samples, n_inputs)
    scaled: Any  # (n_samples, n_classes) logits over T0, less their largest
    margin: Any  # (n_samples,) the label's own of these
    correct: Any  # (n_samples,) 1 where the argmax is the label, else 0
    weight: Any  # (n_samples,)

    @classmethod
    def of(cls, x: Array, scaled: Array, y: Array, weight: Array) -> _Rows:
        centred = scaled - scaled.max(axis=1, keepdims=True)
        correct = (scaled.argmax(axis=1) == y).astype(np.float64)
        return cls(x, centred, centred[np.arange(len(y)), y], correct, weight)

    def take(self, rows: slice) -> _Rows:
        x, scaled, margin, correct, weight = (values[rows] for values in self)
        return _Rows(x, scaled, margin, correct, weight / weight.sum())


def _standardisation(likely: Array, weight: Array) -> tuple[Array, Array]:
    """Mean and deviation of each column."""
    mean = np.average(likely, axis=0, weights=weight)
    deviation = np.sqrt(np.average(np.square(likely - mean), axis=0, weights=weight))
    return mean, np.maximum(deviation, LEAST_SCALE)


def _train(torch: Any, layers: list[Array], rows: _Rows) -> tuple[list[Array], float]:
    """The layers of the best epoch that harms no log loss, on the first fifth of the rows, and the loss's fall."""
    tensors = _Rows(*(torch.as_tensor(values) for values in rows))
    n_held = len(rows.weight) // 5
    held, training = tensors.take(slice(n_held)), tensors.take(slice(n_held, None))
    _, most = _losses(torch, [torch.as_tensor(layer) for layer in layers], held)

    def held_loss(current: list[Any]) -> Any:
        loss, log_loss = _losses(torch, current, held)
        return loss if log_loss <= most else np.inf

    return descend(torch, layers, lambda current: _losses(torch, current, training)[0], held_loss)


def _losses(torch: Any, layers: list[Any], rows: _Rows) -> tuple[Any, Any]:
    """Mean squared difference of confidence and correctness, and mean log loss; the rows' weights sum to one."""
    weight_1, bias_1, weight_2, bias_2 = layers
    output = torch.relu(rows.x @ weight_1 + bias_1) @ weight_2 + bias_2
    ratio = torch.exp(LOG_MOST_RATIO * torch.tanh(output))
    log_total = torch.logsumexp(rows.scaled / ratio, dim=1)
    confidence = torch.exp(-log_total)  # the largest of the scaled logits is zero
    return rows.weight @ (confidence - rows.correct) ** 2, rows.weight @ (log_total - rows.margin / ratio[:, 0])
