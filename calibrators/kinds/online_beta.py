"""online_beta: beta maps of each class's probability that learn from every label as it comes.

`online_platt` with the map of Kull, Silva Filho, Flach, AISTATS 2017 (`beta`) for its lines: sigmoid(a log p - c
log(1-p) + b), which tells the two ends of the scale apart. Online by Gupta, Ramdas, ICML 2023, appendix; their learner
is `calibrators.online.newton.online_beta`. `calibrators.online.experts` has the formulas.
"""

from __future__ import annotations

from calibrators.online.class_wise import ClassWise


class OnlineBetaCalibration(ClassWise):
    """One-vs-rest beta maps, learned online. May change the argmax.

    Attributes
    ----------
    theta_, curvature_, shares_ : see `calibrators.online.experts.State`; the first axis is the class (for two classes
        there is one learner, of class 1)

    Examples
    --------
    Sure of class 1 it is right three times in four, sure of class 0 always.

    >>> logits = [[0.0, 4.0]] * 4 + [[4.0, 0.0]] * 4
    >>> calibrator = OnlineBetaCalibration().fit(logits * 100, ([1, 1, 1, 0] + [0] * 4) * 100)
    >>> calibrator.predict_proba([[0.0, 4.0], [4.0, 0.0]])[:, 1].round(2).tolist()
    [0.76, 0.0]
    """

    beta = True
