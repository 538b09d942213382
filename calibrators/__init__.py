"""Calibration of classifiers: fit on logits and labels, predict probabilities that mean what they say.

>>> import calibrators
>>> calibrator = calibrators.create("temperature").fit([[0.0, 4.0]] * 4, [1, 1, 1, 0])
>>> calibrator.predict_proba([[0.0, 4.0]]).round(2).tolist()
[[0.25, 0.75]]
>>> calibrators.loads(calibrators.dumps(calibrator))
TemperatureScaling()

`fuse` puts a fitted calibrator into a classifier's ONNX graph; `metrics` says how well probabilities fit labels.
"""

from calibrators import auto, metrics
from calibrators.artifact import dumps, loads
from calibrators.base import Calibrator
from calibrators.graph import fuse
from calibrators.inspection import inspect_model
from calibrators.registry import create, kinds

__all__ = ["Calibrator", "auto", "create", "dumps", "fuse", "inspect_model", "kinds", "loads", "metrics"]
