"""Reliability diagrams and the HTML report. They need matplotlib: pip install 'calserve[plots]'."""

from calibrators.plots.reliability import reliability_diagram
from calibrators.plots.report import Example, html_report, telling_example

__all__ = ["Example", "html_report", "reliability_diagram", "telling_example"]
