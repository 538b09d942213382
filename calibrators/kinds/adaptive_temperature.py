"""adaptive_temperature: a small network chooses each row's temperature.

p = softmax(z / T(x)) with T(x) = T0 m(x): T0 is the one temperature that fits best (`temperature`), m a perceptron with
two hidden layers of `HIDDEN` ReLU units. Two published forms:

- "logit_gap": Guo, Tao, Luo, Dong, Xu, "Sample Margin-Aware Recalibration of Temperature" (SMART), arXiv 2506.23492,
  2025. x is the standardised gap of the two largest logits, m = softplus(o(x)) + 0.1.
- "sorted": Tomani, Cremers, Buettner, "Parameterized Temperature Scaling for Boosting the Expressive Power in Post-Hoc
  Uncertainty Calibration" (PTS), ECCV 2022. x is the largest logit less each of the next `SORTED - 1`, standardised;
  m = max(|o(x)|, 0.1).

Both publications let the network say T itself and feed raw logits; here it says the ratio to T0 and sees differences,
so that neither an offset nor the unit of the logits matters. Standardised values end at ±`FARTHEST_INPUT`.

Training minimises the log loss (PTS: the Brier score), or on request SMART's soft-binned ECE, 15 bins at c_b with

    u_ib proportional to exp(-(s_i - c_b)^2 / (2 * 0.05^2)),  sum_b u_ib = 1     s: confidence
    ECE = sum_b |sum_i w_i u_ib (correct_i - s_i)| / sum_i w_i

by Adam on all rows at once, in float64. Do no harm: the last layer starts at zero and m at one, which is temperature
scaling; a fifth of the rows is held out, and the epoch with the least loss there is kept, the start among them. So
on its held-out fifth a fit is never worse than T0 alone, and `improvement_` says by how much it is better.

Equal rows of equal label are one row with the sum of the weights, sorted by their bytes before the seed divides them:
a row of weight two is the row twice, and the order of the rows changes nothing. Fewer than `MIN_ROWS` distinct rows, or
rows without a finite T0, leave m at one. Of many, `MAX_ROWS` (fewer where there are many classes) train the network.

CIFAR-10 ResNet-50, 5,000 rows to fit and 10,000 to score, over seeds 0 to 4: ECE (15 bins, percent) 1.37 by T0 alone,
1.14 to 1.31 by "logit_gap", 1.10 to 1.44 by "sorted", .98 to 1.15 by "soft_ece" (the publication says .764, with T said
by the network itself and no rows held out); log loss .2038, .1950 to .1970, .1910 to .1958, .1999 to .2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.temperature import HIGHEST, LOWEST, TemperatureScaling
from calibrators.numerics import Array, centre, softmax_of_centred, two_largest
from calibrators.training import MIN_ROWS, affine, descend, distinct, drawn, hidden_layer, import_torch

FORMS = ("logit_gap", "sorted")
LOSSES = ("log", "soft_ece")
SORTED = 10
HIDDEN = 16
LAYERS = ("weight_1", "bias_1", "weight_2", "bias_2", "weight_3", "bias_3")
LEAST_RATIO = 0.1
FARTHEST_INPUT = 10.0

BIN_CENTRES, BIN_WIDTH = (np.arange(15) + 0.5) / 15, 0.05


class AdaptiveTemperature(Calibrator):
    """p = softmax(z / T(x)), T(x) > 0 from a small network. Keeps the argmax. The fit needs torch, serving does not.

    Parameters
    ----------
    form : "logit_gap" or "sorted", what the network sees
    loss : "log" or "soft_ece" (for "logit_gap"), what training minimises
    seed : of the network's start and the held-out fifth

    Attributes
    ----------
    temperature_ : () float64, T0
    centre_, scale_ : (n_inputs,) float64, standardise the inputs; 1 for "logit_gap", min(n_classes, SORTED) - 1 else
    weight_1_, bias_1_, weight_2_, bias_2_, weight_3_, bias_3_ : float64, the layers, (inputs, outputs) and (outputs,)
    improvement_ : held-out loss of T0 alone less this fit's, 0 where T is constant (not stored in the artifact)

    Raises
    ------
    ImportError
        by `fit`, where torch is not installed

    Examples
    --------
    Too few rows for a network: one temperature, here 4 / log 3.

    >>> calibrator = AdaptiveTemperature().fit([[0.0, 4.0]] * 4, [1, 1, 1, 0])
    >>> print(f"{calibrator.predict_proba([[0.0, 4.0]])[0, 1]:.6f} {calibrator.improvement_}")
    0.750000 0.0
    """

    learned = ("temperature", "centre", "scale", *LAYERS)
    float32_atol = 1e-5

    def __init__(
        self,
        form: Literal["logit_gap", "sorted"] = "logit_gap",
        loss: Literal["log", "soft_ece"] = "log",
        seed: int = 0,
    ) -> None:
        self.form = form
        self.loss = loss
        self.seed = seed

    def check_params(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.loss == "soft_ece" and self.form != "logit_gap":
            raise ValueError(f"loss 'soft_ece' is for form 'logit_gap', got form {self.form!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed must be a whole number, 0 or above, got {self.seed!r}")

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        torch = import_torch(self.kind)
        logits, y, weight = _distinct(logits, y, weight)
        scaling = TemperatureScaling().fit(logits, y, sample_weight=weight)
        rng = np.random.default_rng(self.seed)
        chosen = drawn(len(y), logits.shape[1], rng)
        logits, y, weight = logits[chosen], y[chosen], weight[chosen]
        gaps = _gaps(logits, self._n_largest(logits.shape[1]))
        self.temperature_, self.improvement_ = scaling.temperature_, 0.0
        self.centre_, self.scale_ = _standardisation(gaps, weight)
        layers = _first_layers(gaps.shape[1], self.form, rng)
        if scaling.converged_ and len(y) >= MIN_ROWS:
            own = logits[np.arange(len(y)), y][:, None]
            correct = (logits.argmax(axis=1) == y).astype(np.float64)
            rows = _Rows(self._inputs(gaps), (logits - own) / scaling.temperature_, correct, weight)
            layers, self.improvement_ = _train(torch, layers, rows, self.form, self.loss)
        for name, layer in zip(LAYERS, layers, strict=True):
            setattr(self, f"{name}_", layer)

    def _predict_proba(self, logits: Array) -> Array:
        dtype = logits.dtype
        with np.errstate(over="ignore"):  # minus infinity is a probability of zero, and far inputs end at the farthest
            x = self._inputs(_gaps(logits, self._n_largest(logits.shape[1])))
            return softmax_of_centred(centre(logits) / (dtype.type(self.temperature_) * self._ratio(x)))

    def emit(self, graph: Graph, logits: str) -> str:
        named = {name: graph.parameter(name, getattr(self, f"{name}_")) for name in self.learned}
        n_largest = self._n_largest(self.n_classes_)
        top = graph.largest(logits, n_largest)
        others = graph.node("Gather", top, graph.constant(np.arange(1, n_largest, dtype=np.int64)), axis=1)
        gaps = graph.node("Sub", graph.column(top, 0), others)
        x = graph.node("Div", graph.node("Sub", gaps, named["centre"]), named["scale"])
        x = graph.node("Max", x, graph.constant(-FARTHEST_INPUT))
        x = graph.node("Min", x, graph.constant(FARTHEST_INPUT))
        for layer in (1, 2, 3):
            x = graph.node("Relu", x) if layer > 1 else x
            x = graph.node("Add", graph.node("MatMul", x, named[f"weight_{layer}"]), named[f"bias_{layer}"])
        positive, bounded = ("Abs", "Max") if self.form == "sorted" else ("Softplus", "Add")
        ratio = graph.node(bounded, graph.node(positive, x), graph.constant(LEAST_RATIO))
        return graph.softmax(graph.node("Div", graph.centre(logits), graph.node("Mul", named["temperature"], ratio)))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        n_inputs = self._n_largest(n_classes) - 1
        widths = (n_inputs, HIDDEN, HIDDEN, 1)
        check_tensor("temperature", tensors["temperature"], np.float64, ())
        for name in ("centre", "scale"):
            check_tensor(name, tensors[name], np.float64, (n_inputs,))
        for layer in (1, 2, 3):
            check_tensor(f"weight_{layer}", tensors[f"weight_{layer}"], np.float64, widths[layer - 1 : layer + 1])
            check_tensor(f"bias_{layer}", tensors[f"bias_{layer}"], np.float64, widths[layer : layer + 1])
        if not LOWEST <= tensors["temperature"] <= HIGHEST:
            raise ValueError(f"temperature must lie in {LOWEST:g}..{HIGHEST:g}, got {tensors['temperature']}")
        if not (tensors["scale"].min() >= LOWEST and tensors["scale"].max() <= HIGHEST):
            raise ValueError(f"scales must lie in {LOWEST:g}..{HIGHEST:g}, got {tensors['scale'].tolist()}")

    def _n_largest(self, n_classes: int) -> int:
        return 2 if self.form == "logit_gap" else min(n_classes, SORTED)

    def _inputs(self, gaps: Array) -> Array:
        """Standardised gaps (n_samples, n_inputs), within ±FARTHEST_INPUT, in their dtype."""
        dtype = gaps.dtype
        x = (gaps - self.centre_.astype(dtype)) / self.scale_.astype(dtype)
        inputs: Array = np.clip(x, -FARTHEST_INPUT, FARTHEST_INPUT)
        return inputs

    def _ratio(self, x: Array) -> Array:
        """m(x), (n_samples, 1)."""
        for layer in (1, 2, 3):
            weight, bias = (getattr(self, f"{part}_{layer}_").astype(x.dtype) for part in ("weight", "bias"))
            x = affine(np.maximum(x, 0) if layer > 1 else x, weight, bias)
        least = x.dtype.type(LEAST_RATIO)
        ratio: Array = np.maximum(np.abs(x), least) if self.form == "sorted" else np.logaddexp(x, 0 * least) + least
        return ratio


class _Rows(NamedTuple):
    """What training sees, as arrays or as tensors."""

    x: Any  # (n_samples, n_inputs)
    scaled: Any  # (n_samples, n_classes) logits less the label's, over T0
    correct: Any  # (n_samples,) whether the argmax is the label
    weight: Any  # (n_samples,)

    def take(self, rows: slice) -> _Rows:
        x, scaled, correct, weight = (values[rows] for values in self)
        return _Rows(x, scaled, correct, weight / weight.sum())


def _distinct(logits: Array, y: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Each distinct pair of a row and its label once, with the sum of its weights, in the order of their bytes."""
    first, total = distinct(np.column_stack([logits, y]), weight)
    return logits[first], y[first], total


def _gaps(logits: Array, n_largest: int) -> Array:
    """The largest logit less each of the next n_largest - 1, in rising order of the gap."""
    if n_largest == 2:
        first, second = two_largest(logits, logits.argmax(axis=1))
        return np.asarray(first - second)
    top = -np.sort(-np.partition(logits, -n_largest, axis=1)[:, -n_largest:], axis=1)
    gaps: Array = top[:, :1] - top[:, 1:]
    return gaps


def _standardisation(gaps: Array, weight: Array) -> tuple[Array, Array]:
    """Mean and deviation of each column; deviation 1 where the gaps never vary."""
    centre = np.average(gaps, axis=0, weights=weight)
    deviation = np.sqrt(np.average(np.square(gaps - centre), axis=0, weights=weight))
    return centre, np.where(deviation >= LOWEST, deviation, 1.0)


def _first_layers(n_inputs: int, form: str, rng: np.random.Generator) -> list[Array]:
    """Hidden layers, then the layer that makes m = 1."""
    one = 1.0 if form == "sorted" else np.log(np.expm1(1 - LEAST_RATIO))
    hidden = hidden_layer(n_inputs, HIDDEN, rng) + hidden_layer(HIDDEN, HIDDEN, rng)
    return [*hidden, np.zeros((HIDDEN, 1)), np.array([one])]


def _train(torch: Any, layers: list[Array], rows: _Rows, form: str, loss: str) -> tuple[list[Array], float]:
    """The layers of the epoch with the least loss on the first fifth of the rows, and the loss's fall there."""
    tensors = _Rows(*(torch.as_tensor(values) for values in rows))
    n_held = len(rows.weight) // 5
    held, training = tensors.take(slice(n_held)), tensors.take(slice(n_held, None))
    return descend(
        torch,
        layers,
        lambda current: _loss(torch, current, training, form, loss),
        lambda current: _loss(torch, current, held, form, loss),
    )


def _loss(torch: Any, layers: list[Any], rows: _Rows, form: str, loss: str) -> Any:
    """Mean log loss or soft-binned ECE of the rows, whose weights sum to one."""
    weight_1, bias_1, weight_2, bias_2, weight_3, bias_3 = layers
    hidden = torch.relu(torch.relu(rows.x @ weight_1 + bias_1) @ weight_2 + bias_2)
    output = hidden @ weight_3 + bias_3
    softplus = torch.nn.functional.softplus
    ratio = output.abs().clamp(min=LEAST_RATIO) if form == "sorted" else softplus(output) + LEAST_RATIO
    scaled = rows.scaled / ratio
    if loss == "log":
        return rows.weight @ torch.logsumexp(scaled, dim=1)
    confidence = torch.softmax(scaled, dim=1).amax(dim=1)
    distance = confidence[:, None] - torch.as_tensor(BIN_CENTRES)
    membership = torch.softmax(-(distance**2) / (2 * BIN_WIDTH**2), dim=1)
    return ((rows.weight * (rows.correct - confidence)) @ membership).abs().sum()
