"""Plots of calibration as files (matplotlib) and as charts of the HTML report (plotly): extra `plots`."""

from calibrators.plots.charts import (
    Chart,
    classwise_chart,
    comparison_chart,
    reliability_chart,
    risk_coverage_chart,
    set_chart,
    temperature_chart,
)
from calibrators.plots.classwise import classwise_reliability
from calibrators.plots.comparison import calibrator_comparison
from calibrators.plots.reliability import reliability_diagram
from calibrators.plots.report import Example, html_report, telling_example
from calibrators.plots.selective import risk_coverage_diagram
from calibrators.plots.sets import set_diagram
from calibrators.plots.temperature import temperature_curve

__all__ = [
    "Chart",
    "Example",
    "calibrator_comparison",
    "classwise_chart",
    "classwise_reliability",
    "comparison_chart",
    "html_report",
    "reliability_chart",
    "reliability_diagram",
    "risk_coverage_chart",
    "risk_coverage_diagram",
    "set_chart",
    "set_diagram",
    "telling_example",
    "temperature_chart",
    "temperature_curve",
]
