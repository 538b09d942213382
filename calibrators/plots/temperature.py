"""The log loss against the temperature: how far from its best value the model is, and how much that costs.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2. Left of the best temperature the model
claims too much, right of it too little; the drop from T = 1, the model as it is, to the lowest point is what
temperature scaling gains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.kinds.temperature import TemperatureScaling
from calibrators.numerics import Array, blocks, check_labels, check_logits, log_softmax
from calibrators.plots._style import (
    INK,
    OVERCONFIDENT,
    PAPER,
    QUIET,
    UNDERCONFIDENT,
    draw_title,
    new_figure,
    place_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 81

_SPREAD = 2.5
"""The curve reaches this factor beyond 1 and the best temperature."""

_WIDEST = 20.0
"""A best temperature beyond this factor from 1 is not drawn: the loss falls towards it all the way."""

_APART = 0.2
"""Nearer to T = 1 than this, in log T, the best temperature alone is named: there is no room for two."""


@dataclass(frozen=True)
class TemperatureLoss:
    """What is drawn, in a file or in the report.

    Attributes
    ----------
    temperatures, losses : (n_temperatures,) the curve, the best temperature among its points if it is drawn
    best : the temperature with the least loss
    is_drawn : False where the loss falls towards `best` all the way
    before, after : log loss at T = 1 and at the best T
    """

    temperatures: NDArray[np.float64]
    losses: NDArray[np.float64]
    best: float
    is_drawn: bool
    before: float
    after: float

    def __str__(self) -> str:
        if self.is_drawn:
            return f"best at T = {self.best:.3g}: log loss {self.after:.4f}"
        return f"no best temperature: the loss falls towards T = {'0' if self.best < 1 else 'infinity'}"

    @property
    def ticks(self) -> list[float]:
        nice = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
        return [t for t in nice if self.temperatures[0] <= t <= self.temperatures[-1]]

    @property
    def names_both(self) -> bool:
        """Whether T = 1 lies far enough from the best temperature to be named beside it."""
        return bool(abs(np.log(self.best)) > _APART)


def temperature_loss(logits: ArrayLike, y: ArrayLike) -> TemperatureLoss:
    """The curve of `temperature_curve` and of `temperature_chart`; errors as there."""
    z = check_logits(logits)
    labels = check_labels(y, n_samples=len(z), n_classes=z.shape[1])
    best = float(TemperatureScaling().fit(z, labels).temperature_)
    drawn = 1 / _WIDEST <= best <= _WIDEST
    ends = (1, best) if drawn else (1, float(np.clip(best, 1 / _WIDEST, _WIDEST)))
    # The best temperature is a point of the curve, where its two colours meet.
    temperatures = np.union1d(np.geomspace(min(ends) / _SPREAD, max(ends) * _SPREAD, _POINTS), [best] if drawn else [])
    before, after = map(float, _losses(z, labels, np.array([1.0, best])))
    return TemperatureLoss(temperatures, _losses(z, labels, temperatures), best, drawn, before, after)


def temperature_curve(logits: ArrayLike, y: ArrayLike) -> Figure:
    """Mean log loss of softmax(logits / T) over T, with T = 1 and the best T marked.

    Parameters
    ----------
    logits : (n_samples, n_classes), finite
    y : (n_samples,) class indices 0 .. n_classes-1

    Returns
    -------
    a matplotlib Figure of no particular backend

    Raises
    ------
    TypeError, ValueError
        for logits or labels that are not
    ImportError
        if matplotlib is not installed
    """
    curve = temperature_loss(logits, y)
    figure = new_figure(6.4, 5.2)
    axes = place_axes(figure, 0.85, 0.75, 5.2, 3.3)
    _draw_curve(axes, curve)
    _mark(axes, 1.0, curve.before, PAPER)
    if curve.names_both:
        _name(axes, 1.0, curve.before, side=-1 if curve.best > 1 else 1)
    if curve.is_drawn:
        _mark(axes, curve.best, curve.after, INK)
        _name(axes, curve.best, curve.after, side=0)
    draw_title(axes, "Log loss over temperature", f"{curve}\nas the model is, T = 1: log loss {curve.before:.4f}")
    return figure


def _losses(logits: Array, y: Array, temperatures: Array) -> Array:
    """Mean log loss at each temperature, (n_temperatures,)."""
    total = np.zeros(len(temperatures))
    for block in blocks(*logits.shape):
        row = np.arange(len(y[block]))
        for index, temperature in enumerate(temperatures):
            total[index] -= log_softmax(logits[block] / temperature)[row, y[block]].sum(dtype=np.float64)
    return total / len(y)


def _draw_curve(axes: Axes, curve: TemperatureLoss) -> None:
    temperatures, losses = curve.temperatures, curve.losses
    sides = (
        (temperatures <= curve.best, OVERCONFIDENT, "overconfident"),
        (temperatures >= curve.best, UNDERCONFIDENT, "underconfident"),
    )
    for side, colour, name in sides:
        if side.any():
            axes.plot(temperatures[side], losses[side], color=colour, linewidth=2.2, zorder=3, label=name)
    axes.set_xscale("log")
    axes.set_xticks(curve.ticks, [f"{t:g}" for t in curve.ticks])
    axes.minorticks_off()
    lowest, highest = losses.min(), losses.max()
    axes.set(xlim=(temperatures[0], temperatures[-1]), ylim=(lowest - 0.12 * (highest - lowest), highest))
    axes.set_xlabel("Temperature T", color=INK, size=10.5, labelpad=7)
    axes.set_ylabel("Log loss", color=INK, size=10.5)
    axes.legend(loc="upper center", frameon=False, labelcolor=INK, fontsize=9)


def _mark(axes: Axes, temperature: float, loss: float, face: str) -> None:
    axes.vlines(temperature, axes.get_ylim()[0], loss, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.scatter(temperature, loss, s=60, c=face, edgecolors=INK, linewidths=1.6, zorder=5, clip_on=False)


def _name(axes: Axes, temperature: float, loss: float, side: int) -> None:
    """The temperature, written above its mark or beneath the curve, to the side where that rises."""
    axes.annotate(
        f"T = {temperature:.3g}",
        (temperature, loss),
        (9 * side, -4 if side else 10),
        textcoords="offset points",
        ha={-1: "right", 0: "center", 1: "left"}[side],
        va="top" if side else "baseline",
        color=INK,
        size=9.5,
        zorder=6,
    )
