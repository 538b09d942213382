"""What is behind an alarm: which kind of change, where, and what to do about it.

Three corrections compete on the labels since the change against the model's own probabilities p = softmax(z). The gain
of a correction is how much more probable, in nats, it makes those labels, each forecast without itself or those after
it: so none gains by merely having more parameters.

    temperature    softmax(s z)                      s learned from the labels before (`calibrators.online.softmax`)
    prior          p_k pi_k / pi0_k, normalised      pi from no label, but from p on the rows since the change: the mode
                                                     by EM (Saerens, Latinne, Decaestecker, Neural Computation 14,
                                                     2002), with 20 K rows of the reference's pi0 added
    class bias     softmax(s z + b)                  s and b learned from the labels before

The largest gain names the correction if it exceeds log 100. Prior is preferred to class bias while its gain is more
than half, since it used no label, provided that the scores changed, as they must where classes come in other
proportions; temperature, while it has less by no more than log 100, since it is the smaller change. Whether the scores
changed, and the inputs, decides the rest. They did if a monitor without labels rang, or if two samples of rows, before
and since, differ at the level `SURE`: a monitor that did not ring may not have seen enough.

    a correction gains   inputs changed   scores changed   kind
    prior                any              any              prior_shift
    class bias           any              any              class_bias
    temperature          yes              any              covariate
    temperature          no               yes              score_pipeline
    temperature          unknown          yes              temperature
    temperature          no or unknown    no               concept
    none                 either of them                    covariate: a harmless one
    none                 no or unknown    no               unknown
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp, norm

from calibrators.numerics import log_softmax, softmax
from calibrators.online import softmax as online
from service.drift.detectors.base import NO_LABEL, Array, Batch, Lumped
from service.drift.states import Cause

LABELS_NEEDED = 200
MARGIN = log(100)
MOST_ROWS = 5000
"""The last before the change, the first since, and the first labels since: more say no more about the change itself."""
PRIOR_PSEUDO_ROWS = 20
"""A class."""
LEAST_PRIOR, EM_STEPS, EM_TOLERANCE = 1e-9, 200, 1e-3
MOST_OF_THE_EVIDENCE = 0.5
SURE = 1e-3
"""Probability that two samples of the same law are taken to differ."""
FEWEST_ROWS = 100
"""Of each sample, to be compared at all."""


def cause(
    evidence: Mapping[str, float],
    reference: Batch,
    since: Batch,
    *,
    scores_rang: bool = False,
    inputs_rang: bool = False,
    class_names: Sequence[str] = (),
) -> Cause:
    """What changed.

    Parameters
    ----------
    evidence : of the detector that rang
    reference : rows from before the change; their labels are not looked at
    since : rows from the change on, in the order of their prediction, -1 where no label is known. The signals of both
        are taken to be of the inputs
    scores_rang, inputs_rang : whether a monitor without labels rang, of the scores, of the inputs
    class_names : of the classes, where they have names

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = 2 * rng.normal(size=(3000, 3))
    >>> y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    >>> z[2000:] *= 2
    >>> rows = Batch(z, y, np.zeros(3000, dtype=int))
    >>> found = cause({}, rows.rows(slice(2000)), rows.rows(slice(2000, None)))
    >>> found.kind, found.action
    ('temperature', 'Fit `temperature` on the 1000 labels since the change.')
    """
    reference, since = (rows.rows(np.flatnonzero(_finite(rows.scores))) for rows in (reference, since))
    segment, share = _largest(evidence, "segment ")
    where, sentences = "", list[str]()
    if share > MOST_OF_THE_EVIDENCE:
        where = f"segment {segment}"
        sentences.append(f"Segment {segment} holds {share:.0%} of the evidence; only its rows are compared.")
        reference, since = (rows.rows(np.flatnonzero(rows.segments == segment)) for rows in (reference, since))
    reference, recent = reference.rows(slice(-MOST_ROWS, None)), since.rows(slice(MOST_ROWS))
    if len(reference) < FEWEST_ROWS:
        sentences.append(f"{len(reference)} rows are known from before the change, {FEWEST_ROWS} are needed.")
        return Cause("unknown", where, sentences, "Wait: there is too little to compare with.")
    scores, inputs = _scores(reference, recent, class_names), _inputs(reference, recent)
    sentences += [difference.said() for difference in scores + inputs if difference.sure]
    n_labels = int((since.labels != NO_LABEL).sum())
    if n_labels < LABELS_NEEDED:
        sentences.append(
            f"{n_labels} labels have come since the change, {LABELS_NEEDED} are needed to tell what it did."
        )
        more = LABELS_NEEDED - n_labels
        return Cause("unknown", where, sentences, f"Send labels of rows since the change: {more} more.")
    gains = gains_of(reference.logits, since)
    changed_inputs = (inputs_rang or any(d.sure for d in inputs)) if inputs or inputs_rang else None
    case = _Case(where, gains, scores_rang or any(d.sure for d in scores), changed_inputs, evidence, class_names)
    found = case.cause()
    return Cause(found.kind, found.where, [*sentences, gains.said(), *found.evidence], found.action)


@dataclass(frozen=True)
class _Case:
    """What is known when the labels suffice; None: nothing is known of the inputs."""

    where: str
    gains: Gains
    scores_changed: bool
    inputs_changed: bool | None
    evidence: Mapping[str, float]
    class_names: Sequence[str]

    def cause(self) -> Cause:
        temperature, prior, class_bias = self.gains[:3]
        if max(temperature, prior, class_bias) < MARGIN:
            return self._harmless() if self.scores_changed or self.inputs_changed else self._nothing()
        if prior > max(MARGIN, temperature, class_bias / 2 if self.scores_changed else class_bias):
            return self._prior_shift()
        if class_bias > temperature + MARGIN or temperature < MARGIN:
            return self._class_bias()
        return self._stretched() if self.scores_changed or self.inputs_changed else self._concept()

    def _nothing(self) -> Cause:
        return Cause(
            "unknown",
            self.where,
            ["No correction explains what the alarm saw: it was a passing change, or one of another kind."],
            "Look at the reliability diagram of the rows since the change; fit anew if the alarm comes again.",
        )

    def _harmless(self) -> Cause:
        return Cause(
            "covariate",
            self.where,
            ["Other rows come than before, and the probabilities are as true on them."],
            "Nothing has to be fitted. If the new rows stay, make a new reference.",
        )

    def _prior_shift(self) -> Cause:
        before, since = self.gains.priors_before, self.gains.priors
        k = int(np.argmax(np.abs(np.log(since / before))))
        return Cause(
            "prior_shift",
            self.where,
            [
                f"The classes come in other proportions: most of all {self._named(k)}, "
                f"{before[k]:.1%} of rows before and about {since[k]:.1%} since."
            ],
            f"Fit {self._on_labels('class_prior')}.",
        )

    def _concept(self) -> Cause:
        said = ["The scores are as before; the labels at the same scores are not."]
        if self.inputs_changed is None:
            said.append("Of the inputs nothing is known: noise in them may look the same.")
        return Cause(
            "concept",
            self.where,
            said,
            "Look at how labels are made and what the classes mean now. Until the model is trained on new labels, "
            f"fit {self._on_labels('temperature')}.",
        )

    def _class_bias(self) -> Cause:
        k, share = _largest(self.evidence, "class ")
        biases = self.gains.biases
        if share <= MOST_OF_THE_EVIDENCE:
            k = int(np.argmax(np.abs(biases)))
        much, factor = "much" if biases[k] < 0 else "little", exp(abs(biases[k]))
        said = [f"The model gives too {much} to {self._named(k)}: its odds are off by a factor of {factor:.1f}."]
        if not self.scores_changed:
            said.append("No change of the scores is seen: what counts as this class may have changed.")
        return Cause(
            "class_bias",
            ", ".join(filter(None, (self.where, self._named(k)))),
            said,
            f"Fit {self._on_labels('class_prior')}, and look at what feeds this class and at who labels it.",
        )

    def _stretched(self) -> Cause:
        on_labels = self._on_labels("temperature")
        if self.inputs_changed:
            said = "The inputs changed, and the model's confidence did not follow its accuracy."
            action = f"Look at where the inputs come from. Until then, fit {on_labels}."
            return Cause("covariate", self.where, [said], action)
        if self.inputs_changed is None:
            return Cause("temperature", self.where, [], f"Fit {on_labels}.")
        return Cause(
            "score_pipeline",
            self.where,
            ["The scores changed and the inputs did not."],
            "Look at what lies between the inputs and the scores: another model file, rounding to fewer digits, "
            f"other preparation of features. Until then, fit {on_labels}.",
        )

    def _named(self, k: int) -> str:
        return _named(k, self.class_names)

    def _on_labels(self, kind: str) -> str:
        return f"`{kind}` on the {self.gains.n_labels} labels since the change"


# ---- what the labels say


class Gains(NamedTuple):
    """Of the corrections, in nats, and what they came to.

    Attributes
    ----------
    divided_by : the temperature
    biases : (n_classes,) of the last correction, their median 0
    priors_before, priors : (n_classes,)
    """

    temperature: float
    prior: float
    class_bias: float
    n_labels: int
    divided_by: float
    biases: Array
    priors_before: Array
    priors: Array

    def said(self) -> str:
        way = "Dividing" if self.divided_by >= 1 else "Multiplying"
        factor = max(self.divided_by, 1 / self.divided_by)
        return (
            f"{way} all logits by {factor:.2f} makes the {self.n_labels} labels since the change "
            f"{_odds(self.temperature)}; correcting for the classes' new frequencies makes them {_odds(self.prior)}; "
            f"a temperature and a bias for each class, {_odds(self.class_bias)}."
        )


def gains_of(reference: Array, since: Batch) -> Gains:
    """What the three corrections gain on the labels of `since`, the first `MOST_ROWS` of them.

    Parameters
    ----------
    reference : (n_rows, n_classes) logits
    """
    labelled = np.flatnonzero(since.labels != NO_LABEL)[:MOST_ROWS]
    logits, y = since.rows(labelled).logits, since.labels[labelled]
    gains, theta = online.gains(logits, y)
    before = np.maximum(softmax(reference).mean(axis=0), LEAST_PRIOR)
    priors = _priors(softmax(since.rows(slice(MOST_ROWS)).logits), before)
    ratio, log_p = np.log(priors / before), log_softmax(logits)
    prior = ratio[y] - np.log(np.exp(log_p + ratio).sum(axis=1))
    memories = gains[2:]  # of the experts with biases, mixed alike
    class_bias = memories.max() + np.log(np.exp(memories - memories.max()).mean())
    biases = theta[2 + int(memories.argmax()), 1:]
    biases = biases - np.median(biases)
    numbers = float(gains[1]), float(prior.sum()), float(class_bias), len(y), float(1 / theta[1, 0])
    return Gains(*numbers, biases, before, priors)


def _priors(p: Array, before: Array) -> Array:
    """The most probable frequencies of classes (n_classes,) of rows of which the model says p (n_rows, n_classes)."""
    priors, pseudo = before, PRIOR_PSEUDO_ROWS * len(before)
    for _ in range(EM_STEPS):
        ratio = priors / before
        rows_by_class = ratio * (p.T @ (1 / (p @ ratio)))
        new = (rows_by_class + pseudo * before) / (len(p) + pseudo)
        moved, priors = np.abs(new / priors - 1).max(), new
        if moved < EM_TOLERANCE:
            break
    return priors


def _odds(gain: float) -> str:
    """A gain in words.

    >>> _odds(53.0), _odds(0.3), _odds(-3.0)
    ('10^23 times more probable', '1.3 times more probable', '20 times less probable')
    """
    much = abs(gain) / log(10)
    factor = f"10^{much:.0f}" if much >= 4 else f"{10**much:,.0f}" if much >= 1 else f"{10**much:.1f}"
    return f"{factor} times {'more' if gain >= 0 else 'less'} probable"


# ---- what the rows say


@dataclass(frozen=True)
class _Difference:
    """Of one thing between two samples; `p` is the probability of as large a one by chance, times the tests made."""

    what: str
    before: float
    since: float
    p: float

    @property
    def sure(self) -> bool:
        return self.p < SURE

    def said(self) -> str:
        chance = "below 1e-12" if self.p < 1e-12 else f"{self.p:.0e}"
        moved = f"was {self.before:.3g} before the change and is {self.since:.3g} since"
        return f"{self.what} {moved}; the probability that chance does this is {chance}."


def _finite(scores: Array | Lumped) -> NDArray[np.bool_]:
    return scores.finite if isinstance(scores, Lumped) else np.asarray(np.isfinite(scores.max(axis=1)))


def _scores(reference: Batch, since: Batch, class_names: Sequence[str]) -> list[_Difference]:
    if len(since) < FEWEST_ROWS:
        return []
    before, after = softmax(reference.logits), softmax(since.logits)
    return _corrected(
        [
            _numbers("Mean confidence", before.max(axis=1), after.max(axis=1)),
            _class_that_moved_most(before, after, class_names),
        ]
    )


def _inputs(reference: Batch, since: Batch) -> list[_Difference]:
    """Of the signals; a row in which one is not a finite number is not compared."""
    found = []
    for name in sorted(reference.signals.keys() & since.signals.keys()):
        before, after = (values[np.isfinite(values)] for values in (reference.signals[name], since.signals[name]))
        if min(len(before), len(after)) >= FEWEST_ROWS:
            found.append(_numbers(f"The mean of {name}", before, after))
    return _corrected(found)


def _numbers(what: str, before: Array, since: Array) -> _Difference:
    p = float(ks_2samp(before, since, method="asymp").pvalue)
    return _Difference(what, float(before.mean()), float(since.mean()), p)


def _class_that_moved_most(before: Array, since: Array, class_names: Sequence[str]) -> _Difference:
    """Of the mean probabilities of the classes, by the normal law of a difference of means."""
    variance = before.var(axis=0) / len(before) + since.var(axis=0) / len(since)
    moved = (since.mean(axis=0) - before.mean(axis=0)) / np.sqrt(np.maximum(variance, 1e-300))
    k = int(np.abs(moved).argmax())
    p = 2 * before.shape[1] * float(norm.sf(abs(moved[k])))
    what = f"The mean probability of {_named(k, class_names)}"
    return _Difference(what, float(before[:, k].mean()), float(since[:, k].mean()), p)


def _named(k: int, class_names: Sequence[str]) -> str:
    return f"class {k} ({class_names[k]})" if k < len(class_names) else f"class {k}"


def _corrected(found: list[_Difference]) -> list[_Difference]:
    """For the number of tests."""
    return [replace(difference, p=min(1.0, difference.p * len(found))) for difference in found]


def _largest(evidence: Mapping[str, float], prefix: str) -> tuple[int, float]:
    """Of the parts named so: the number of the largest, and its share; 0 where there is none."""
    shares = {int(name.removeprefix(prefix)): share for name, share in evidence.items() if name.startswith(prefix)}
    return max(shares.items(), key=lambda item: item[1], default=(0, 0.0))
