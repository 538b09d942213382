"""online_platt: logistic curves of each class's log-odds that learn from every label as it comes.

After Gupta, Ramdas, "Online Platt scaling with calibeating", ICML 2023, whose learner is `calibrators.online.newton`
and which this one betters (benchmarks/online.py): it starts at the identity instead of at one half, forgets at six
rates, bends where no sigmoid fits, and mixes all of these with the model's own probability, so that it does no harm.
`calibrators.online.experts` has the formulas.

`fit` learns from the rows in their order, `partial_fit` from further ones. What is served are the coefficients of the
mixture, so a step of learning is another feed of the same graph. With K classes a label costs K times that of two.
"""

from __future__ import annotations

from calibrators.online.class_wise import ClassWise


class OnlinePlattScaling(ClassWise):
    """One-vs-rest logistic curves, learned online. May change the argmax.

    Attributes
    ----------
    theta_, curvature_, shares_ : see `calibrators.online.experts.State`; the first axis is the class (for two classes
        there is one learner, of class 1)

    Examples
    --------
    A model that says .98 and is right three times in four: the calibrator follows, and follows back when it mends.

    >>> logits = [[0.0, 4.0]] * 400
    >>> calibrator = OnlinePlattScaling().fit(logits, [1, 1, 1, 0] * 100)
    >>> calibrator.predict_proba(logits[:1])[:, 1].round(2).tolist()
    [0.76]
    >>> calibrator.partial_fit(logits, [1] * 400).predict_proba(logits[:1])[:, 1].round(2).tolist()
    [0.98]
    """
