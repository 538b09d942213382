"""What every detector promises, run over every file of `service/drift/detectors` that defines one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.drift.detectors.base import NO_LABEL, Batch, Detector
from service.drift.detectors.registry import create, kinds, parameters_of

Parameters = dict[str, Any]

PARAMETERS: dict[str, list[Parameters]] = {
    "adwin": [{}, {"every": 1}],
    "page_hinkley": [{}, {"reference": "mean"}],
    "recalibration": [
        {},
        {"tolerance": 0.01, "adaptive": 0},
        {"families": "top_label", "max_segments": 0, "horizon": 1e3},
        {"families": "temperature, class_bias, top_label", "tolerance": 0.02},
    ],
    "score_shift": [{"reference_rows": 300}],
    "windowed_ece": [{"limit": 0.15, "window": 300, "every": 7}],
}
"""Variants of a kind where its defaults leave arithmetic untested, or want a long reference."""

VARIANTS = [(kind, parameters) for kind in kinds() for parameters in PARAMETERS.get(kind, [{}])]
every_kind = pytest.mark.parametrize(
    ("kind", "parameters"), VARIANTS, ids=[f"{kind}{parameters or ''}" for kind, parameters in VARIANTS]
)

N_ROWS, CHANGE = 2500, 1500


def draw(n_classes: int = 4, *, n_rows: int = N_ROWS, change: int = CHANGE, seed: int = 0) -> Batch:
    """Logits that are right, and from `change` on three times as large as is right; one label in ten has not come."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n_rows, n_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    labels[rng.random(n_rows) < 0.1] = NO_LABEL
    logits[change:] *= 3
    return Batch(logits, labels, rng.integers(0, 3, n_rows), {"density": rng.normal(size=n_rows)})


def read(detector: Detector, batch: Batch, cuts: NDArray[np.int64] | tuple[int, ...] = ()) -> list[int]:
    """The rows that it rings at, going on after each."""
    rang = []
    for first, last in zip([0, *cuts], [*cuts, len(batch)], strict=True):
        while first < last and (row := detector.update(batch.rows(slice(first, last)))) is not None:
            first += row + 1
            rang.append(int(first - 1))
    return rang


def same(left: Detector, right: Detector) -> bool:
    ours, theirs = left.state(), right.state()
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_detectors_are_found_by_their_filenames() -> None:
    assert {"adwin", "page_hinkley", "recalibration", "windowed_ece"} <= set(kinds())
    assert not {"base", "bets", "registry", "top_label"} & set(kinds())


@every_kind
@pytest.mark.parametrize("n_classes", [2, 4])
def test_how_rows_are_divided_changes_nothing_to_the_last_bit(
    kind: str, parameters: Parameters, n_classes: int
) -> None:
    batch, whole, divided = draw(n_classes), create(kind, **parameters), create(kind, **parameters)
    cuts = np.sort(np.random.default_rng(1).choice(np.arange(1, N_ROWS), size=150, replace=False))
    assert read(whole, batch) == read(divided, batch, cuts)
    assert same(whole, divided)
    one_by_one = create(kind, **parameters)
    read(one_by_one, batch.rows(slice(0, 400)), tuple(range(1, 400)))
    again = create(kind, **parameters)
    read(again, batch.rows(slice(0, 400)))
    assert same(one_by_one, again)


@every_kind
def test_it_rings_after_the_change_and_not_before(kind: str, parameters: Parameters) -> None:
    detector, batch = create(kind, **parameters), draw()
    row = detector.update(batch)
    assert row is not None and row >= CHANGE
    assert detector.ready and detector.statistic >= detector.threshold
    other = create(kind, **parameters)
    assert other.update(batch.rows(slice(0, row))) is None
    assert other.statistic < other.threshold


@every_kind
def test_rows_behind_the_one_that_it_rang_at_are_not_read(kind: str, parameters: Parameters) -> None:
    detector, other, batch = create(kind, **parameters), create(kind, **parameters), draw()
    row = detector.update(batch)
    assert row is not None
    other.update(batch.rows(slice(0, row + 1)))
    assert same(detector, other)


@every_kind
@pytest.mark.parametrize("n_read", [0, 1, 700, 1600])
def test_a_restored_detector_goes_on_as_if_nothing_had_been(kind: str, parameters: Parameters, n_read: int) -> None:
    detector, batch = create(kind, **parameters), draw()
    read(detector, batch.rows(slice(0, n_read)))
    kept = detector.state()
    frozen = {name: array.copy() for name, array in kept.items()}
    restored = create(kind, **parameters).restore(kept)
    rest = batch.rows(slice(n_read, None))
    assert restored.n_rows == detector.n_rows and restored.statistic == detector.statistic
    assert read(restored, rest) == read(detector, rest)
    assert same(restored, detector)
    assert all(np.array_equal(kept[name], frozen[name]) for name in kept), "a state is a copy"


@every_kind
def test_a_state_does_not_grow_with_the_rows(kind: str, parameters: Parameters) -> None:
    detector, batch = create(kind, **parameters), draw(n_rows=900, change=900)
    read(detector, batch)
    size = sum(array.nbytes for array in detector.state().values())
    read(detector, batch)
    assert sum(array.nbytes for array in detector.state().values()) == size


@every_kind
def test_it_refuses_the_state_of_another_detector(kind: str, parameters: Parameters) -> None:
    detector = create(kind, **parameters)
    read(detector, draw(n_rows=500))
    state = detector.state()
    others = [name for name in kinds() if name != kind]
    with pytest.raises(ValueError, match="state"):
        create(others[0]).restore(state)
    number = next(name for name, value in detector.parameters().items() if isinstance(value, float))
    changed = {**detector.parameters(), number: 0.9 * float(detector.parameters()[number]) or 0.5}
    with pytest.raises(ValueError, match="state"):
        create(kind, **changed).restore(state)
    for name in state:
        with pytest.raises(ValueError):
            create(kind, **parameters).restore({key: array for key, array in state.items() if key != name})


@pytest.mark.parametrize("kind", kinds())
def test_parameters_that_cannot_be_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="parameters"):
        create(kind, no_such_parameter=1)
    for name in parameters_of(kind):
        for value in (np.nan, np.inf, -1.0, "no such word"):
            with pytest.raises(ValueError):
                create(kind, **{name: value})


def test_an_unknown_kind_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ValueError, match="recalibration"):
        create("no_such_kind")


@every_kind
def test_parameters_may_come_as_floats(kind: str, parameters: Parameters) -> None:
    made = create(kind, **parameters)
    floats = {name: value if isinstance(value, str) else float(value) for name, value in made.parameters().items()}
    assert create(kind, **floats).parameters() == made.parameters()


@every_kind
@pytest.mark.parametrize("n_classes", [1, 2, 3, 1000])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e300, -1e300, 0.0])
def test_rows_of_any_numbers_have_an_answer(kind: str, parameters: Parameters, n_classes: int, odd: float) -> None:
    detector = create(kind, **parameters)
    batch = draw(max(n_classes, 2), n_rows=120, change=60)
    logits = batch.logits[:, :n_classes].copy()
    logits[::3, 0], logits[1::7] = odd, odd
    batch = replace(batch, scores=logits, labels=np.where(batch.labels < n_classes, batch.labels, 0))
    read(detector, batch)
    assert np.isfinite(detector.statistic) and np.isfinite(detector.threshold)
    assert all(np.isfinite(array).all() for array in detector.state().values() if array.dtype.kind == "f")


@every_kind
def test_where_one_class_always_comes_it_has_an_answer(kind: str, parameters: Parameters) -> None:
    detector, batch = create(kind, **parameters), draw(3)
    read(detector, replace(batch, labels=np.zeros(N_ROWS, np.int64)))
    assert np.isfinite(detector.statistic)


@every_kind
def test_rows_without_a_label_pass_a_labelled_detector_by(kind: str, parameters: Parameters) -> None:
    detector, other, batch = create(kind, **parameters), create(kind, **parameters), draw()
    unlabelled = replace(batch, labels=np.full(N_ROWS, NO_LABEL))
    if detector.labelled:
        assert read(detector, unlabelled) == [] and detector.n_rows == 0
        known = np.flatnonzero(batch.labels != NO_LABEL)
        rang = read(detector, batch)
        assert list(known[read(other, batch.rows(known))]) == rang
    else:
        assert read(detector, unlabelled) == read(other, batch)
    assert same(detector, other)


@every_kind
def test_the_change_lies_among_the_rows_read_and_near_where_it_was(kind: str, parameters: Parameters) -> None:
    detector, batch = create(kind, **parameters), draw()
    assert detector.change_point() == 1
    for row in range(0, N_ROWS, 50):
        if detector.update(batch.rows(slice(row, row + 50))) is not None:
            break
        assert 1 <= detector.change_point() <= max(1, detector.n_rows)
    assert 1 <= detector.change_point() <= 500


@every_kind
def test_evidence_is_empty_or_sums_to_one(kind: str, parameters: Parameters) -> None:
    detector, batch = create(kind, **parameters), draw()
    assert detector.evidence() == {}
    for row in range(0, N_ROWS, 100):
        read(detector, batch.rows(slice(row, row + 100)))
        shares = detector.evidence()
        assert not shares or sum(shares.values()) == pytest.approx(1)
        assert all(share > 0 for share in shares.values())


@every_kind
def test_after_a_reset_it_begins_anew(kind: str, parameters: Parameters) -> None:
    detector, batch = create(kind, **parameters), draw()
    read(detector, batch)
    was_ready = detector.ready
    detector.reset()
    assert detector.n_rows == 0 and detector.ready == was_ready and detector.statistic < detector.threshold
    if detector.labelled:
        fresh = create(kind, **parameters)
        assert read(detector, batch) == read(fresh, batch)
        assert same(detector, fresh)


@every_kind
def test_a_batch_without_rows_changes_nothing(kind: str, parameters: Parameters) -> None:
    detector, other, batch = create(kind, **parameters), create(kind, **parameters), draw()
    for each in (detector, other):
        read(each, batch.rows(slice(0, 800)))
    assert detector.update(batch.rows(slice(0, 0))) is None
    assert same(detector, other)
