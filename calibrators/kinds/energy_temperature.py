"""energy_temperature: a row's temperature rises where its energy is that of rows that were wrong.

Kim, Kim, Hwang, "Uncertainty Calibration with Energy Based Instance-wise Scaling in the Wild Dataset", ECCV 2024:
p = softmax(z / T(x)),

    T(x) = T - theta_0 N_right(E) + theta_1 N_wrong(E)        E = -logsumexp(z), theta_0 and theta_1 >= 0

with T of temperature scaling and N_right, N_wrong the normal densities that fit the energies of the rows whose argmax
is the label, and of the others (there, of rows of foreign data too). Here a density is taken relative to its peak,
d = 1 at its mean, which moves a factor into theta, and all is measured in T:

    T(x) = T (1 - a d_right(E) + b d_wrong(E))        0 <= a <= `MOST_OFF`, 0 <= b <= `MOST_ON`

so T(x) > 0 whatever was learned (theirs may cross zero). T, a and b are fitted together, by the log loss, from (T of
temperature scaling, 0, 0): on the rows of the fit it is never worse than one temperature. They keep T and take the
Brier score.

The energy is also an out-of-distribution score (Liu, Wang, Owens, Li, "Energy-based Out-of-distribution Detection",
NeurIPS 2020): rows unlike those of the training have a higher one. It is the output `ood_score`.

Softmax does not see a number added to all logits of a row, the energy does: this is for logits as a network computes
them. Of probabilities, passed as their logarithms, every energy is zero, and this is temperature scaling.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import minimize

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.temperature import HIGHEST, LOWEST, TemperatureScaling
from calibrators.numerics import Array, centre, softmax_of_centred

MOST_OFF, MOST_ON = 0.9, 9.0
LEAST_SCALE = 0.01
"""Energies that differ by less are alike: to magnify them would magnify float32's rounding."""
LOG_RANGE = 3.0
"""How far T may go from where temperature scaling has it, as a logarithm."""


class EnergyTemperature(Calibrator):
    """p = softmax(z / T(x)), T(x) > 0 from the row's energy. Keeps the argmax. Has the output `ood_score`.

    Attributes
    ----------
    temperature_ : () float64, T
    weights_ : (2,) float64, a and b
    centre_, scale_ : (2,) float64, mean and deviation of the energies of rows that were right, and wrong
    converged_ : whether temperature scaling has a finite optimum (not stored in the artifact)

    Examples
    --------
    Rows of both energies say .95; those of high energy are right three times in five.

    >>> rng = np.random.default_rng(0)
    >>> sure = np.arange(2000) < 1000
    >>> logits = np.where(sure, 9.0, 5.0)[:, None] - [0, 3] + rng.normal(scale=0.3, size=(2000, 1))
    >>> y = (rng.random(2000) > np.where(sure, 0.95, 0.6)).astype(int)
    >>> calibrator = EnergyTemperature().fit(logits, y)
    >>> calibrator.predict_proba([[9.0, 6.0], [5.0, 2.0]])[:, 0].round(2).tolist()
    [0.96, 0.61]
    >>> calibrator.predict_further([[9.0, 6.0], [5.0, 2.0]])["ood_score"].round(1).tolist()
    [-9.0, -5.0]
    """

    learned = ("temperature", "weights", "centre", "scale")
    float32_atol = 1e-4

    @property
    def further_outputs(self) -> tuple[str, ...]:
        return ("ood_score",)

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        scaling = TemperatureScaling().fit(logits, y, sample_weight=weight)
        self.temperature_, self.weights_ = scaling.temperature_, np.zeros(2)
        self.converged_ = scaling.converged_
        energy, right = _energy(logits), logits.argmax(axis=1) == y
        moments = [_moments(energy[rows], weight[rows]) for rows in (right, ~right)]
        self.centre_, self.scale_ = (np.array(values) for values in zip(*moments, strict=True))
        if self.converged_ and 0 < right.sum() < len(y):
            self._descend(logits, y, weight / weight.sum(), self._densities(energy))

    def _descend(self, logits: Array, y: Array, weight: Array, densities: Array) -> None:
        """T, a and b by L-BFGS-B with the log loss's own gradient."""
        centred = logits - logits[np.arange(len(y)), y][:, None]
        direction = densities * [-1.0, 1.0]
        start = np.array([np.log(self.temperature_), 0.0, 0.0])

        def loss(x: Array) -> tuple[float, Array]:
            ratio = 1 + direction @ x[1:]
            t = np.exp(x[0]) * ratio
            scaled = centred / t[:, None]
            top = scaled.max(axis=1, keepdims=True)
            terms = np.exp(scaled - top)
            total = terms.sum(axis=1, keepdims=True)
            # d log loss / d log t = - E_p[scaled]
            slope = -weight * ((terms / total) * scaled).sum(axis=1)
            gradient = np.append(slope.sum(), direction.T @ (slope / ratio))
            return float(weight @ (np.log(total) + top)[:, 0]), gradient

        bounds = [(start[0] - LOG_RANGE, start[0] + LOG_RANGE), (0, MOST_OFF), (0, MOST_ON)]
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12, "gtol": 1e-8})
        if found.fun < loss(start)[0]:
            self.temperature_ = np.asarray(np.clip(np.exp(found.x[0]), LOWEST, HIGHEST))
            self.weights_ = np.array(found.x[1:])

    def _predict_proba(self, logits: Array) -> Array:
        with np.errstate(over="ignore"):  # minus infinity is a probability of zero
            return softmax_of_centred(centre(logits) / self._temperatures(logits)[:, None])

    def _predict_further(self, logits: Array) -> dict[str, Array]:
        return {"ood_score": _energy(logits)}

    def emit(self, graph: Graph, logits: str) -> str:
        named = {name: graph.parameter(name, getattr(self, f"{name}_")) for name in self.learned}
        largest = graph.reduce("ReduceMax", logits)
        centred = graph.node("Sub", logits, largest)
        total = graph.node("Log", graph.reduce("ReduceSum", graph.node("Exp", centred)))
        energy = graph.node("Neg", graph.node("Add", largest, total))
        graph.further("ood_score", graph.reshape(energy, (-1,)))
        x = graph.node("Div", graph.node("Sub", energy, named["centre"]), named["scale"])
        densities = graph.node("Exp", graph.node("Mul", graph.node("Mul", x, x), graph.constant(-0.5)))
        weighted = graph.node(
            "Mul", densities, graph.node("Mul", named["weights"], graph.constant(np.array([-1.0, 1.0])))
        )
        ratio = graph.node("Add", graph.reduce("ReduceSum", weighted), graph.constant(1.0))
        return graph.softmax(graph.node("Div", centred, graph.node("Mul", named["temperature"], ratio)))

    def _temperatures(self, logits: Array) -> Array:
        """T(x), (n_samples,)."""
        weights = (self.weights_ * [-1.0, 1.0]).astype(logits.dtype)
        densities = self._densities(_energy(logits))
        ratio = 1 + (densities[:, 0] * weights[0] + densities[:, 1] * weights[1])
        temperatures: Array = logits.dtype.type(self.temperature_) * ratio
        return temperatures

    def _densities(self, energy: Array) -> Array:
        """Of rows that were right and wrong, relative to their peaks, (n_samples, 2)."""
        x = (energy[:, None] - self.centre_.astype(energy.dtype)) / self.scale_.astype(energy.dtype)
        with np.errstate(over="ignore", under="ignore"):
            densities: Array = np.exp(-0.5 * x * x)
        return densities

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        del n_classes
        check_tensor("temperature", tensors["temperature"], np.float64, ())
        for name in ("weights", "centre", "scale"):
            check_tensor(name, tensors[name], np.float64, (2,))
        if not LOWEST <= tensors["temperature"] <= HIGHEST:
            raise ValueError(f"temperature must lie in {LOWEST:g}..{HIGHEST:g}, got {tensors['temperature']}")
        off, on = tensors["weights"]
        if not (0 <= off <= MOST_OFF and 0 <= on <= MOST_ON):
            raise ValueError(f"weights must lie in 0..{MOST_OFF:g} and 0..{MOST_ON:g}, got {off} and {on}")
        if not (tensors["scale"].min() >= LEAST_SCALE and tensors["scale"].max() <= HIGHEST):
            raise ValueError(f"scales must lie in {LEAST_SCALE:g}..{HIGHEST:g}, got {tensors['scale'].tolist()}")


def _energy(logits: Array) -> Array:
    """-logsumexp of each row, (n_samples,)."""
    largest = logits.max(axis=1)
    energy: Array = -(largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1)))
    return energy


def _moments(energy: Array, weight: Array) -> tuple[float, float]:
    """Mean and deviation; of no rows 0 and 1."""
    if not len(energy):
        return 0.0, 1.0
    mean = float(np.average(energy, weights=weight))
    return mean, max(LEAST_SCALE, float(np.sqrt(np.average((energy - mean) ** 2, weights=weight))))
