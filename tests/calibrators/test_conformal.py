"""Conformal kinds: the coverage that they promise, their sets by definition, their graph, their state."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import calibrators
from calibrators.conformal import Thresholds, create_score
from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.conformal.division import divide, hashes_of, uniforms
from calibrators.conformal.level import least_rows, rank
from calibrators.conformal.score import SLACK, Score, members
from calibrators.conformal.scores import names
from calibrators.conformal.thresholds import MOST_KEPT
from calibrators.graph import stage

Array = NDArray[Any]
VALUES: dict[str, dict[str, float]] = {"raps": {"penalty": 0.01, "free_ranks": 3.0}, "saps": {"weight": 0.1}}
KINDS = ("split_conformal", "class_conditional_conformal", "clustered_conformal")
RANDOMISED = ("aps", "raps", "saps", "top_k")


def draw(n_samples: int, n_classes: int, *, seed: int = 0, sharpness: float = 3.0) -> tuple[Array, Array]:
    """Probabilities and labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(n_samples, n_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True), labels


def fitted(kind: str, n_classes: int = 6, *, n_samples: int = 600, seed: int = 0, **params: Any) -> ConformalCalibrator:
    p, y = draw(n_samples, n_classes, seed=seed)
    calibrator = calibrators.create(kind, **params).fit(np.log(p), y)
    assert isinstance(calibrator, ConformalCalibrator)
    return calibrator


def covered(sets: Array, y: Array) -> Array:
    return np.asarray(sets[np.arange(len(y)), y])


def by_definition(score: Score, p: Array, share: float) -> Array:
    """(n_samples, n_classes) each label's score, from its formula, label by label."""
    found = np.empty(p.shape)
    for row, label in np.ndindex(p.shape):
        own, v = p[row, label], np.sort(p[row])[::-1]
        rank_of = 1 + int((p[row] > own).sum())
        mass = p[row][p[row] > own].sum() + share * own
        found[row, label] = {
            "lac": -own,
            "aps": mass,
            "raps": mass + VALUES["raps"]["penalty"] * max(0.0, rank_of - VALUES["raps"]["free_ranks"]),
            "saps": share * v[0] if rank_of == 1 else v[0] + (rank_of - 2 + share) * VALUES["saps"]["weight"],
            "margin": np.delete(p[row], label).max() - own,
            "top_k": rank_of - 1 + share,
        }[score.name]
    return found


# ---- ranks and thresholds


def test_a_rank_is_exact_for_every_level_that_can_be_written() -> None:
    for thousandths in range(1, 1000):
        level = thousandths / 1000
        for n in (1, 9, 19, 99, 199, 999, 12345):
            assert rank(level, n) == math.ceil(Fraction(thousandths, 1000) * (n + 1))
    assert [least_rows(level) for level in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]


def test_a_threshold_is_the_order_statistic_of_numpy_and_infinite_beyond_the_largest() -> None:
    scores = np.random.default_rng(0).normal(size=57).astype(np.float32)
    thresholds = Thresholds.of(scores)
    for level in (0.01, 0.5, 0.9, 0.95, 0.98):
        k = rank(level, 57)
        assert thresholds.at(level)[0] == np.quantile(scores, k / 57, method="inverted_cdf")
    assert thresholds.at(0.99)[0] == np.inf


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_level_outside_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Thresholds.of(np.arange(5)).at(level)


@pytest.mark.parametrize("level", ["0.9", None, True, [0.9]])
def test_a_level_that_is_no_number_is_a_type_error(level: Any) -> None:
    with pytest.raises(TypeError, match="confidence_level must be a number"):
        Thresholds.of(np.arange(5)).at(level)


def test_groups_have_thresholds_of_their_own_and_an_empty_one_an_infinite_one() -> None:
    rng = np.random.default_rng(0)
    scores, group = rng.normal(size=400).astype(np.float32), rng.integers(0, 3, size=400)
    thresholds = Thresholds.of(scores, group=group, n_groups=4)
    for k in range(3):
        assert thresholds.at(0.9)[k] == Thresholds.of(scores[group == k]).at(0.9)[0]
    assert thresholds.at(0.9)[3] == np.inf
    assert thresholds.totals.tolist() == [*np.bincount(group).astype(float), 0.0]


def test_weights_count_rows() -> None:
    rng = np.random.default_rng(1)
    scores, counts = rng.normal(size=50).astype(np.float32), rng.integers(1, 5, size=50)
    weighted, repeated = Thresholds.of(scores, counts), Thresholds.of(np.repeat(scores, counts))
    for level in (0.1, 0.5, 0.9, 0.99):
        np.testing.assert_array_equal(weighted.at(level), repeated.at(level))
    halves = Thresholds.of(scores, np.full(50, 0.5))
    assert halves.at(0.5)[0] == np.sort(scores)[25]  # 13 of 25 are needed, 26 rows of a half


def test_a_million_rows_are_kept_as_few_scores_with_the_error_that_is_stated() -> None:
    scores = np.random.default_rng(0).permutation(1_000_000).astype(np.float32)  # each is its rank, less one
    thresholds = Thresholds.of(scores)
    assert len(thresholds.scores) <= MOST_KEPT
    for level in (0.5, 0.9, 0.99, 0.9999, 0.999999):
        excess = thresholds.at(level)[0] + 1 - rank(level, 1_000_000)
        assert 0 <= excess <= 1_000_000 / MOST_KEPT + 1
    assert thresholds.at(0.9999999)[0] == np.inf


# ---- scores and sets by definition


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_scores_and_sets_are_what_the_definition_says(name: str, share: float) -> None:
    score = create_score(name, VALUES.get(name))
    p = np.concatenate([draw(40, 7)[0], np.full((1, 7), 1 / 7), [[0.4, 0.4, 0.1, 0.1, 0, 0, 0]]]).astype(np.float32)
    shares = np.full(len(p), share)
    wanted = by_definition(score, p.astype(np.float64), share if score.uses_share else 0.0)
    found = np.stack([score.of_labels(p, np.full(len(p), k), shares) for k in range(7)], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    for threshold in np.quantile(wanted, [0.0, 0.2, 0.5, 0.8, 1.0]):
        limits = np.array([threshold], dtype=np.float32)
        inside = members(p, score.cuts(p, limits, shares), allow_empty=True)
        away = np.abs(wanted - threshold) > 2 * SLACK
        np.testing.assert_array_equal(inside[away], (wanted <= threshold)[away])
        assert inside[np.abs(wanted - threshold) < SLACK / 16].all()  # equal is in


@pytest.mark.parametrize("name", names())
def test_a_set_by_several_thresholds_is_each_labels_own(name: str) -> None:
    score = create_score(name, VALUES.get(name))
    p = draw(50, 7)[0].astype(np.float32)
    limits = np.quantile(score.of_labels(p, p.argsort(axis=1)[:, 3]), np.linspace(0.1, 0.9, 7)).astype(np.float32)
    inside = members(p, score.cuts(p, limits), allow_empty=True)
    for k in range(7):
        alone = members(p, score.cuts(p, limits[[k]]), allow_empty=True)
        np.testing.assert_array_equal(inside[:, k], alone[:, k])


@pytest.mark.parametrize("name", names())
def test_labels_of_equal_probability_are_all_in_or_all_out(name: str) -> None:
    score = create_score(name, VALUES.get(name))
    p = np.array([[0.3, 0.3, 0.2, 0.2], [0.25] * 4], dtype=np.float32)
    for threshold in np.linspace(-1, 2, 61, dtype=np.float32):
        inside = members(p, score.cuts(p, np.array([threshold])), allow_empty=True)
        assert (inside[:, 0] == inside[:, 1]).all()
        assert (inside[:, 2] == inside[:, 3]).all()
        assert inside[1].all() or not inside[1].any()


def test_infinite_thresholds_take_all_labels_and_none() -> None:
    p = draw(5, 4)[0].astype(np.float32)
    for name in names():
        score = create_score(name, VALUES.get(name))
        assert members(p, score.cuts(p, np.array([np.inf], dtype=np.float32)), allow_empty=True).all()
        nothing = score.cuts(p, np.array([-np.inf], dtype=np.float32))
        assert not members(p, nothing, allow_empty=True).any()
        np.testing.assert_array_equal(members(p, nothing, allow_empty=False), p == p.max(axis=1, keepdims=True))


# ---- coverage


@pytest.mark.parametrize("n_classes", [10, 100, 1000])
@pytest.mark.parametrize("name", names())
def test_coverage_over_200_splits_is_within_the_band(name: str, n_classes: int) -> None:
    """200 splits of 1,200 rows into 199 and 1,001: without ties each has an expected coverage of k / 200 exactly, given
    the rows. The mean of 200 is compared with the band at six of its standard errors; that of one split is at most that
    of the Beta(k, 200 - k) law plus the binomial's of 1,001 rows. By the normal law a false failure has probability 2e-9.
    """
    level, n = 0.9, 199
    p, y = draw(1200, n_classes, sharpness=1.5)
    assert (p.argmax(axis=1) == y).mean() < level  # else deterministic scores tie at 0
    score = create_score(name, VALUES.get(name))
    rng = np.random.default_rng(0)
    shares = rng.uniform(size=len(y)) if score.name == "top_k" else None  # ranks tie
    scores = score.of_labels(p, y, shares)
    k = rank(level, n)
    found = []
    for _ in range(200):
        order = rng.permutation(len(y))
        threshold = Thresholds.of(scores[order[:n]]).at(level)[0]
        found.append((scores[order[n:]] <= threshold).mean())
    c = k / (n + 1)
    error = math.sqrt((c * (1 - c) / (n + 2) + c * (1 - c) / 1001) / 200)
    assert level - 6 * error <= np.mean(found) <= level + 1 / (n + 1) + 6 * error
    assert abs(np.mean(found) - c) <= 6 * error
    inside = members(
        p.astype(np.float32), score.cuts(p.astype(np.float32), np.array([threshold]), shares), allow_empty=True
    )
    assert abs(covered(inside, y).mean() - (scores <= threshold).mean()) < 2e-3


@pytest.mark.parametrize(("score", "randomised"), [("lac", False), ("aps", False), ("raps", True), ("saps", False)])
def test_a_fitted_kind_covers_new_rows_as_asked(score: str, randomised: bool) -> None:
    """400 fits on 120 rows, 90 of them for the thresholds, each judged on 100 rows: expected coverage between .9 and
    .9 + 1/91; six standard errors of the mean are .0081 (Beta(82, 9) and binomial), false failure 2e-9."""
    found = []
    for seed in range(400):
        p, y = draw(220, 4, seed=seed, sharpness=1.5)
        logits = 2 * np.log(p)
        fit = calibrators.create("split_conformal", score=score, randomised=randomised).fit(logits[:120], y[:120])
        assert isinstance(fit, ConformalCalibrator)
        shares = np.random.default_rng(seed).uniform(size=100) if randomised else None
        found.append(covered(fit.predict_set(logits[120:], shares=shares), y[120:]).mean())
    error = math.sqrt((0.09 / 92 + 0.09 / 100) / 400)
    assert 0.9 - 6 * error <= np.mean(found) <= 0.9 + 1 / 91 + 6 * error


def hard_and_easy(n_rows: int, n_classes: int, seed: int) -> tuple[Array, Array]:
    """Every second class is hard: its rows look like those of all the others."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(n_classes), n_rows)
    strength = np.where(y % 2, 2.0, 6.0)
    return rng.normal(size=(len(y), n_classes)) + strength[:, None] * np.eye(n_classes)[y], y


def coverage_gap(sets: Array, y: Array, level: float = 0.9) -> float:
    """Mean distance of the classes' coverage from the level (CovGap of Ding et al.)."""
    hit = covered(sets, y)
    return float(np.mean([abs(hit[y == k].mean() - level) for k in np.unique(y)]))


def test_class_conditional_sets_cover_each_class() -> None:
    """250 rows a class on 400 others: coverage of a class lies within .9 -.08 .. +.08 (Beta and binomial, four standard
    errors of .019; ten classes, false failure below 1e-3); one threshold for all misses the hard ones by more."""
    train, test = hard_and_easy(333, 10, seed=0), hard_and_easy(400, 10, seed=1)
    by_class, of_all = (
        fit.predict_set(test[0])
        for fit in (
            calibrators.create("class_conditional_conformal").fit(*train),
            calibrators.create("split_conformal").fit(*train),
        )
    )
    classes = [covered(by_class, test[1])[test[1] == k].mean() for k in range(10)]
    assert 0.82 < min(classes) < max(classes) < 0.98
    assert min(covered(of_all, test[1])[test[1] == k].mean() for k in range(10)) < 0.82


def test_clusters_beat_classes_at_few_rows_and_one_threshold_for_all() -> None:
    """CovGap of Ding et al. on 200 classes of 20 rows, half of them hard; what they report of ImageNet at 20 rows:
    classwise 5.4, clustered 3.8."""
    train, test = hard_and_easy(20, 200, seed=0), hard_and_easy(60, 200, seed=1)
    params = {"base": "identity", "tuning_share": 0.1}
    fits = {kind: calibrators.create(kind, **params).fit(*train) for kind in KINDS}
    sets = {kind: fit.predict_set(test[0]) for kind, fit in fits.items() if isinstance(fit, ConformalCalibrator)}
    gaps = {kind: coverage_gap(found, test[1]) for kind, found in sets.items()}
    assert gaps["clustered_conformal"] < gaps["class_conditional_conformal"] < gaps["split_conformal"]
    assert sets["clustered_conformal"].sum() < sets["class_conditional_conformal"].sum()


def test_classes_too_few_to_cluster_have_the_threshold_of_all_rows() -> None:
    logits, y = hard_and_easy(60, 4, seed=0)
    kept = (y != 3) | (np.arange(len(y)) % 20 == 0)  # three rows of the last class
    fit = calibrators.create("clustered_conformal", base="identity", n_clusters=2).fit(logits[kept], y[kept])
    assert isinstance(fit, ConformalCalibrator)
    assert fit.group_of_class_[3] == 0
    assert fit.group_of_class_[0] == fit.group_of_class_[2] != fit.group_of_class_[1]
    totals = fit.thresholds_.totals
    assert totals[0] > totals[1:].sum()  # all rows, those of the clusters among them


def test_every_cluster_has_the_threshold_of_its_own_rows() -> None:
    logits, y = hard_and_easy(200, 6, seed=0)
    fit = calibrators.create("clustered_conformal", base="identity", n_clusters=2).fit(logits, y)
    assert isinstance(fit, ConformalCalibrator)
    easy, hard = fit.group_of_class_[0], fit.group_of_class_[1]
    assert fit.group_of_class_.tolist() == [easy, hard] * 3
    assert sorted([easy, hard]) == [1, 2]
    totals = fit.thresholds_.totals
    assert totals[easy] == totals[hard] == totals[0] / 2
    new, labels = hard_and_easy(2000, 6, seed=1)
    hits = covered(fit.predict_set(new), labels)
    for parity in (0, 1):  # 450 rows for the threshold of each, 6,000 to judge: four standard errors are .06
        assert abs(hits[labels % 2 == parity].mean() - 0.9) < 0.06
    assert fit.thresholds()[hard] > fit.thresholds()[easy] + 0.1


# ---- what callers meet


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", names())
def test_sets_grow_with_the_level(kind: str, score: str) -> None:
    fit = fitted(kind, score=score)
    logits = np.log(draw(200, 6, seed=1)[0])
    previous = fit.predict_set(logits, 0.01)
    for level in (0.3, 0.6, 0.9, 0.99, 0.9999):
        sets = fit.predict_set(logits, level)
        assert (sets >= previous).all()
        previous = sets
    assert previous.all()  # no finite threshold reaches 0.9999 on 450 rows
    np.testing.assert_array_equal(fit.predict_set(logits), fit.predict_set(logits, 0.9))


@pytest.mark.parametrize("score", RANDOMISED)
def test_randomised_sets_are_those_of_their_numbers(score: str) -> None:
    fit = fitted("split_conformal", score=score, randomised=True)
    logits = np.log(draw(300, 6, seed=1)[0])
    shares = np.random.default_rng(0).uniform(size=300)
    sets = fit.predict_set(logits, shares=shares)
    np.testing.assert_array_equal(sets, fit.predict_set(logits, shares=shares))
    np.testing.assert_array_equal(sets[:1], fit.predict_set(logits[:1], shares=shares[:1]))
    assert (sets != fit.predict_set(logits, shares=shares[::-1])).any()
    for wrong in (None, shares[:5], np.ones(300), np.full(300, np.nan)):
        with pytest.raises(ValueError, match=r"shares|uniform number"):
            fit.predict_set(logits, shares=wrong)
    with pytest.raises(ValueError, match=r"shape \(n_samples, 6\), got \(3, 5\)"):
        fit.sets(np.zeros((3, 5)), shares=shares[:3])
    with pytest.raises(ValueError, match="takes no shares"):
        fitted("split_conformal", score=score).predict_set(logits, shares=shares)


def test_no_set_is_empty_where_that_is_chosen_and_coverage_only_grows() -> None:
    rows, (p, y) = draw(2000, 6, sharpness=6.0), draw(2000, 6, seed=1, sharpness=6.0)
    sets = []
    for allow_empty in (True, False):
        fit = calibrators.create("split_conformal", base="identity", allow_empty=allow_empty)
        assert isinstance(fit.fit(np.log(rows[0]), rows[1]), ConformalCalibrator)
        sets.append(fit.predict_set(np.log(p), 0.8))
    assert (sets[0].sum(axis=1) == 0).any()
    assert sets[1].any(axis=1).all()
    assert (sets[1] >= sets[0]).all()
    gained = covered(sets[1], y).mean() - covered(sets[0], y).mean()
    assert 0 < gained <= (sets[0].sum(axis=1) == 0).mean()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"base": "split_conformal"}, "no sets of its own"),
        ({"base": "nothing"}, "unknown kind 'nothing'"),
        ({"base_params": {"x": 1}}, "temperature has parameters"),
        ({"score": "hinge"}, "score must be one of aps, lac"),
        ({"score": "raps", "score_params": {"penalty": 0.1}}, r"\['free_ranks', 'penalty'\], got \['penalty'\]"),
        ({"score": "raps", "score_params": {"penalty": -1.0, "free_ranks": 1}}, "penalty must be"),
        ({"score": "raps", "score_params": {"penalty": 0.1, "free_ranks": 1.5}}, "free_ranks must be a whole"),
        ({"score": "saps", "score_params": {"weight": True}}, "must be numbers"),
        ({"score": "saps", "score_params": {"weight": float("nan")}}, "weight must be"),
        ({"confidence_level": 1.0}, "strictly between"),
        ({"randomised": True}, "nothing to randomise"),
        ({"allow_empty": 1}, "true or false"),
        ({"tuning_share": 0.0}, "between 0 and 1"),
    ],
)
def test_parameters_outside_their_range_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrators.create("split_conformal", **params)


def test_too_few_rows_to_divide_are_named() -> None:
    with pytest.raises(ValueError, match="too few rows to divide: temperature needs rows of at least 2 classes"):
        calibrators.create("split_conformal").fit([[0.0, 1.0], [1.0, 0.0], [0.5, 0.0]], [0, 1, 0])


def test_given_parameters_of_a_score_are_kept_and_others_are_tuned() -> None:
    given = fitted("split_conformal", score="saps", score_params={"weight": 0.17})
    assert given.score_.values.tolist() == [0.17]
    tuned = fitted("split_conformal", score="raps", n_classes=30, n_samples=2000)
    assert tuned.score_.values[0] in (0.001, 0.01, 0.1, 0.2, 0.5)
    p, y = draw(2000, 30, seed=0)
    ranks = 1 + (p > p[np.arange(2000), y][:, None]).sum(axis=1)
    assert abs(tuned.score_.values[1] - np.quantile(ranks, 0.9)) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_two_is_the_row_twice_in_everything_that_is_learned(kind: str) -> None:
    p, y = draw(300, 5)
    counts = np.random.default_rng(1).integers(1, 4, size=300)
    weighted = calibrators.create(kind, score="raps").fit(np.log(p), y, sample_weight=counts)
    repeated = calibrators.create(kind, score="raps").fit(np.repeat(np.log(p), counts, axis=0), np.repeat(y, counts))
    for name, array in weighted.tensors().items():
        np.testing.assert_allclose(array, repeated.tensors()[name], atol=1e-6)


# ---- dividing rows


def test_rows_are_divided_by_their_values_alone() -> None:
    p, y = draw(1000, 5)
    hashes = hashes_of(p, y)
    first, second = divide(hashes, np.ones(1000), 0.25)
    assert first.sum() == 250
    np.testing.assert_array_equal(first + second, 1)
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(divide(hashes_of(p[order], y[order]), np.ones(1000), 0.25)[0], first[order])
    assert len(np.unique(hashes)) == 1000
    assert hashes_of(p, (y + 1) % 5)[0] != hashes[0]


def test_hashes_draw_numbers_that_are_uniform() -> None:
    """Kolmogorov and Smirnov's distance of 20,000 draws; beyond .016 has probability 1e-4 (the rows are fixed)."""
    p, y = draw(20_000, 2)
    drawn = np.sort(uniforms(hashes_of(p.round(2), y + np.arange(20_000))))
    assert np.abs(drawn - np.arange(20_000) / 20_000).max() < 0.016


# ---- the graph


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", names())
@pytest.mark.parametrize("opset", [9, 11, 17])
def test_the_graph_makes_the_same_sets_bit_for_bit(kind: str, score: str, opset: int) -> None:
    fit = fitted(
        kind, n_classes=12, n_samples=1500, score=score, score_params=VALUES.get(score), allow_empty=score != "lac"
    )
    logits = np.log(draw(500, 12, seed=1)[0]).astype(np.float32)
    proto = stage(fit, opset, sets=True).proto
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    p, sets, sizes = session.run(["probabilities", "prediction_set", "set_size"], {"logits": logits})
    np.testing.assert_array_equal(sets, fit.sets(p))
    assert sets.dtype == bool
    assert sizes.dtype == np.int32
    np.testing.assert_array_equal(sizes, sets.sum(axis=1))
    assert 1 < sizes.mean() < 11


def test_a_thousand_classes_have_the_same_sets_in_the_graph() -> None:
    fit = fitted("split_conformal", n_classes=1000, n_samples=400, score="aps")
    logits = np.log(draw(50, 1000, seed=1)[0]).astype(np.float32)
    proto = stage(fit, sets=True).proto
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    p, sets = session.run(["probabilities", "prediction_set"], {"logits": logits})
    np.testing.assert_array_equal(sets, fit.sets(p))


def test_randomised_sets_have_no_graph() -> None:
    with pytest.raises(ValueError, match="randomised"):
        stage(fitted("split_conformal", score="aps", randomised=True), sets=True)


# ---- the artifact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["lac", "raps"])
def test_an_artifact_holds_base_score_and_thresholds(kind: str, score: str) -> None:
    fit = fitted(kind, score=score, base="platt")
    loaded = calibrators.loads(calibrators.dumps(fit))
    assert isinstance(loaded, ConformalCalibrator)
    logits = np.log(draw(100, 6, seed=1)[0])
    for level in (0.5, 0.9, 0.99):
        np.testing.assert_array_equal(loaded.predict_set(logits, level), fit.predict_set(logits, level))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda t: t.pop("ranks"), "has tensors"),
        (lambda t: t.pop("base/temperature"), "temperature has tensors"),
        (lambda t: t.update(scores=t["scores"][::-1]), "ascend within each group"),
        (lambda t: t.update(ranks=t["ranks"][1:]), "'ranks' must be float64 of shape"),
        (lambda t: t.update(ranks=-t["ranks"]), "ascend within each group"),
        (lambda t: t.update(starts=np.array([0, 5])), "starts must ascend from 0"),
        (lambda t: t.update(group_of_class=np.full(6, 1)), "group_of_class must hold groups 0..0"),
        (lambda t: t.update(score_parameters=np.array([-1.0, 2.0])), "penalty must be"),
        (lambda t: t.update(n_classes=np.array(7)), "the base has 6 classes, the sets 7"),
    ],
)
def test_tensors_that_no_fit_gives_are_refused(changed: Any, message: str) -> None:
    fit = fitted("split_conformal", score="raps")
    tensors = fit.tensors()
    changed(tensors)
    with pytest.raises(ValueError, match=message):
        calibrators.create("split_conformal", score="raps").set_tensors(tensors)


def test_ties_behind_a_binned_base_survive_the_rounding_of_the_graph() -> None:
    """Where most rows share a few scores, a threshold is one of these, and a last digit would drop all rows that tie."""
    rng = np.random.default_rng(0)
    p, y = draw(3000, 3)
    fit = calibrators.create("split_conformal", base="histogram_binning", base_params={"n_bins": 3}).fit(np.log(p), y)
    assert isinstance(fit, ConformalCalibrator)
    assert len(fit.thresholds_.scores) < 60
    logits = np.log(draw(2000, 3, seed=1)[0]).astype(np.float32)
    proto = stage(fit, sets=True).proto
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    served = session.run(["prediction_set"], {"logits": logits})[0]
    numpys = fit.predict_set(logits)
    np.testing.assert_array_equal(served, numpys)
    off = fit.predict_proba(logits) * (1 + 4e-7 * rng.choice([-1, 1], size=(2000, 3))).astype(np.float32)
    np.testing.assert_array_equal(fit.sets(off), numpys)


def test_no_rows_have_no_sets() -> None:
    for kind in KINDS:
        for score in names():
            assert fitted(kind, score=score).predict_set(np.zeros((0, 6))).shape == (0, 6)
