"""Plots of calibration, and the HTML report. They need matplotlib: pip install 'calserve[plots]'."""

from calibrators.plots.classwise import classwise_reliability
from calibrators.plots.comparison import calibrator_comparison
from calibrators.plots.reliability import reliability_diagram
from calibrators.plots.report import Example, html_report, telling_example
from calibrators.plots.selective import risk_coverage_diagram
from calibrators.plots.temperature import temperature_curve

__all__ = [
    "Example",
    "calibrator_comparison",
    "classwise_reliability",
    "html_report",
    "reliability_diagram",
    "risk_coverage_diagram",
    "telling_example",
    "temperature_curve",
]
