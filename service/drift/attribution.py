"""What is behind an alarm: which kind of change, where, and what to do about it.

Three corrections compete on the labels since the change, each forecasting a label from what came before it, against
the model's own probabilities p = softmax(z). The gain of a correction is how much more probable, in nats, it made
those labels: a prequential log-likelihood ratio, so no correction is paid for merely having more parameters.

    temperature    softmax(s z)                      s learned online (`calibrators.online.softmax`)
    prior          p_k pi_k / pi0_k, normalised      pi without labels, from the last 1000 forecasts: the mode by EM
                                                     (Saerens, Latinne, Decaestecker, Neural Computation 14, 2002) with
                                                     200 rows of the reference's pi0 added in thought
    class bias     softmax(s z + b)                  s and b learned online

The largest gain names the correction if it exceeds log 100; prior is preferred to class bias while its gain is more
than half, since it used no label. What the monitors without labels saw decides the rest:

    a correction gains   inputs changed   scores changed   kind
    prior                any              any              prior_shift
    class bias           any              yes or unknown   class_bias
    temperature          yes              any              covariate
    temperature          no               yes              score_pipeline
    temperature          unknown          yes or unknown   temperature
    either of the last   no or unknown    no               concept
    none                 yes or scores did                 covariate: a harmless one
    none                 no               no               unknown
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibrators.numerics import log_softmax, softmax
from calibrators.online import softmax as online
from service.drift.detectors.base import NO_LABEL, Array, Batch
from service.drift.states import Cause

LABELS_NEEDED = 200
MOST_LABELS = 5000
"""The first since the change; later ones say no more about it."""
MARGIN = log(100)
PRIOR_ROWS, PRIOR_PSEUDO_ROWS, PRIOR_EVERY, EM_STEPS = 1000, 200, 50, 20
MOST_OF_THE_EVIDENCE = 0.5


class Gains(NamedTuple):
    """Of each correction, in nats; and the temperature and biases (n_classes,) that the last one ended with."""

    temperature: float
    prior: float
    class_bias: float
    divided_by: float
    biases: Array
    priors: Array


def cause(
    evidence: Mapping[str, float],
    reference: Batch,
    since: Batch,
    *,
    scores_changed: bool | None = None,
    inputs_changed: bool | None = None,
    class_names: Sequence[str] = (),
) -> Cause:
    """What changed.

    Parameters
    ----------
    evidence : of the detector that rang
    reference : rows from before the change; their labels are not looked at
    since : rows from the change on, in the order of their prediction, -1 where no label is known
    scores_changed, inputs_changed : whether the monitors without labels of the scores, and of the inputs, rang; None
        where there is no such monitor
    class_names : of the classes, where they have names
    """
    return _Case(evidence, reference, since, scores_changed, inputs_changed, class_names).cause()


class _Case:
    def __init__(
        self,
        evidence: Mapping[str, float],
        reference: Batch,
        since: Batch,
        scores_changed: bool | None,
        inputs_changed: bool | None,
        class_names: Sequence[str],
    ) -> None:
        self.scores_changed, self.inputs_changed, self.class_names = scores_changed, inputs_changed, class_names
        self.where, self.sentences = "", list[str]()
        segment, share = _largest(evidence, "segment ")
        if share > MOST_OF_THE_EVIDENCE:
            self.where = f"segment {segment}"
            self.sentences.append(f"Segment {segment} holds {share:.0%} of the evidence; only its rows are compared.")
            reference, since = (rows.rows(np.flatnonzero(rows.segments == segment)) for rows in (reference, since))
        self.evidence, self.reference, self.since = evidence, reference, since
        self.n_labels = int((since.labels != NO_LABEL).sum())

    def cause(self) -> Cause:
        if not len(self.reference):
            return self._unknown(
                "There are no rows from before the change to compare with.", "Wait for the next alarm."
            )
        self._describe_scores()
        if self.n_labels < LABELS_NEEDED:
            return self._unknown(
                f"{self.n_labels} labels have come since the change, {LABELS_NEEDED} are needed to tell what it did.",
                f"Send labels: {LABELS_NEEDED - self.n_labels} more of rows since the change.",
            )
        gains = gains_of(self.reference.logits, self.since)
        self._describe_gains(gains)
        if max(gains[:3]) < MARGIN:
            return self._harmless()
        if gains.prior > MARGIN and gains.prior > max(gains.temperature, gains.class_bias / 2):
            return self._prior_shift(gains)
        if self.scores_changed is False and not self.inputs_changed:
            return self._concept(gains)
        if gains.class_bias > gains.temperature:
            return self._class_bias(gains)
        return self._stretched()

    # ---- kinds

    def _unknown(self, sentence: str, action: str) -> Cause:
        return Cause("unknown", self.where, [*self.sentences, sentence], action)

    def _harmless(self) -> Cause:
        if self.inputs_changed or self.scores_changed:
            self.sentences.append("Other inputs come than before, and the probabilities are as true on them.")
            return self._cause("covariate", "Nothing has to be fitted. If the new inputs stay, make a new reference.")
        return self._unknown(
            "No correction explains what the alarm saw: it was a passing change, or one of another kind.",
            "Look at the reliability diagram of the rows since the change; fit anew if the alarm comes again.",
        )

    def _prior_shift(self, gains: Gains) -> Cause:
        before = softmax(self.reference.logits).mean(axis=0)
        k = int(np.argmax(np.abs(np.log(gains.priors / before))))
        self.sentences.append(
            f"The classes come in other proportions: most of all {self._class(k)}, "
            f"{before[k]:.1%} of rows before and about {gains.priors[k]:.1%} since."
        )
        return self._cause("prior_shift", f"Fit `class_prior` on the {self.n_labels} labels since the change.")

    def _concept(self, gains: Gains) -> Cause:
        by_class = gains.class_bias > gains.temperature
        if by_class:
            self._name_class(gains)
        self.sentences.append(
            "The scores are distributed as before, and the labels are not what they were at the same scores."
        )
        kind = "class_prior" if by_class else "temperature"
        return self._cause(
            "concept",
            "Look at how labels are made and what the classes mean now. Until the model is trained on new labels, "
            f"fit `{kind}` on the {self.n_labels} labels since the change.",
        )

    def _class_bias(self, gains: Gains) -> Cause:
        self._name_class(gains)
        return self._cause(
            "class_bias",
            f"Fit `class_prior` on the {self.n_labels} labels since the change, and look at what feeds this class.",
        )

    def _stretched(self) -> Cause:
        fit = f"fit `temperature` on the {self.n_labels} labels since the change."
        if self.inputs_changed:
            self.sentences.append("The inputs changed, and the model does not know how much less sure it should be.")
            return self._cause("covariate", f"Look at where the inputs come from. Until that is mended, {fit}")
        if self.inputs_changed is False:
            self.sentences.append("The scores changed and the inputs did not.")
            return self._cause(
                "score_pipeline",
                "Look at what lies between the inputs and the scores: another model file, rounding to fewer digits, "
                f"other preparation of features. Until that is mended, {fit}",
            )
        return self._cause("temperature", fit[0].upper() + fit[1:])

    # ---- sentences

    def _cause(self, kind: str, action: str) -> Cause:
        return Cause(kind, self.where, self.sentences, action)

    def _describe_scores(self) -> None:
        before, after = (softmax(rows.logits).max(axis=1).mean() for rows in (self.reference, self.since))
        self.sentences.append(
            f"The model's mean confidence was {before:.1%} before the change and is {after:.1%} since."
        )
        for what, changed in (("scores", self.scores_changed), ("inputs", self.inputs_changed)):
            if changed is not None:
                said = "have changed" if changed else "have not changed"
                self.sentences.append(f"The {what} {said}, by the monitors that need no label.")

    def _describe_gains(self, gains: Gains) -> None:
        said = "dividing" if gains.divided_by >= 1 else "multiplying"
        factor = max(gains.divided_by, 1 / gains.divided_by)
        self.sentences.append(
            f"The {self.n_labels} labels since the change are {_odds(gains.temperature)} if one corrects by {said} all "
            f"logits by {factor:.2f}, {_odds(gains.prior)} if by the classes' new frequencies, and "
            f"{_odds(gains.class_bias)} if by a temperature and a bias for each class."
        )

    def _name_class(self, gains: Gains) -> None:
        k, share = _largest(self.evidence, "class ")
        if share <= MOST_OF_THE_EVIDENCE:
            k = int(np.argmax(np.abs(gains.biases)))
        self.where = f"{self.where}, class {k}" if self.where else f"class {k}"
        much = "too much" if gains.biases[k] < 0 else "too little"
        factor = np.exp(abs(gains.biases[k]))
        self.sentences.append(
            f"The model gives {much} to {self._class(k)}: its odds are off by a factor of {factor:.1f}."
        )

    def _class(self, k: int) -> str:
        return f"class {k} ({self.class_names[k]})" if self.class_names else f"class {k}"


def gains_of(reference: Array, since: Batch) -> Gains:
    """What the three corrections gain on the first `MOST_LABELS` labels of `since`.

    Parameters
    ----------
    reference : (n_rows, n_classes) logits
    """
    (labelled,) = np.nonzero(since.labels != NO_LABEL)
    labelled = labelled[:MOST_LABELS]
    y = since.labels[labelled]
    gains, theta = online.gains(since.logits[labelled], y)
    prior, priors = _prior_gain(reference, since.logits, labelled, y)
    by_memory = gains[2:]
    class_bias = float(by_memory.max() + np.log(np.exp(by_memory - by_memory.max()).mean()))
    biased = theta[2 + int(by_memory.argmax()), 1:]
    biases = biased - np.median(biased)
    return Gains(float(gains[1]), prior, class_bias, float(1 / theta[1, 0]), biases, priors)


def _prior_gain(
    reference: Array, logits: Array, labelled: NDArray[np.intp], y: NDArray[np.int64]
) -> tuple[float, Array]:
    """The gain, and the priors at the end, which every `PRIOR_EVERY` rows are found again from the rows before."""
    before = softmax(reference).mean(axis=0)
    priors, gain = before, 0.0
    log_p = log_softmax(logits[: labelled[-1] + 1])
    for start in range(0, len(log_p), PRIOR_EVERY):
        recent = log_p[max(0, start - PRIOR_ROWS) : start]
        priors = _priors(np.exp(recent), before, priors)
        inside = (labelled >= start) & (labelled < start + PRIOR_EVERY)
        log_ratio = np.log(priors / before)
        gain += float(log_ratio[y[inside]].sum())
        gain -= float(np.log(np.exp(log_p[labelled[inside]] + log_ratio).sum(axis=1)).sum())
    return gain, priors


def _priors(p: Array, before: Array, priors: Array) -> Array:
    """The most probable frequencies of classes (n_classes,) of rows of which the model says p (n_rows, n_classes)."""
    for _ in range(EM_STEPS):
        posterior = p * (priors / before)
        posterior /= posterior.sum(axis=1, keepdims=True)
        new = (posterior.sum(axis=0) + PRIOR_PSEUDO_ROWS * before) / (len(p) + PRIOR_PSEUDO_ROWS)
        moved, priors = np.abs(new - priors).max(), new
        if moved < 1e-6:
            break
    return priors


def _largest(evidence: Mapping[str, float], prefix: str) -> tuple[int, float]:
    """Of the parts named so: the number of the largest, and its share; 0 where there is none."""
    shares = {int(name.removeprefix(prefix)): share for name, share in evidence.items() if name.startswith(prefix)}
    return max(shares.items(), key=lambda item: item[1], default=(0, 0.0))


def _odds(gain: float) -> str:
    """A gain in words.

    >>> _odds(53.0), _odds(0.3), _odds(-3.0)
    ('10^23 times as probable', '1.3 times as probable', '20 times less probable')
    """
    much = abs(gain) / log(10)
    factor = f"10^{much:.0f}" if much >= 4 else f"{10**much:,.0f}" if much >= 1 else f"{10**much:.1f}"
    return f"{factor} times {'as' if gain >= 0 else 'less'} probable"
