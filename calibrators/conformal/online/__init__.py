"""Online learners of a threshold, a file each, driven by the labels that arrive."""

from calibrators.conformal.online.aci import AdaptiveConformal
from calibrators.conformal.online.decaying import DecayingSteps
from calibrators.conformal.online.dtaci import DynamicallyTunedConformal
from calibrators.conformal.online.learner import OnlineThreshold, restored
from calibrators.conformal.online.pid import ConformalPID

__all__ = [
    "AdaptiveConformal",
    "ConformalPID",
    "DecayingSteps",
    "DynamicallyTunedConformal",
    "OnlineThreshold",
    "restored",
]
