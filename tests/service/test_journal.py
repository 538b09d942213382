"""The journal: what is kept comes back, a label is joined once, and readers see each pair once and in order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import service.store.journal
from service.errors import Damaged, Stale
from service.store import reading
from service.store.database import Connection
from service.store.journal_tables import PACK_COLUMNS, PackRow, RecentPacks, Retention, prune, used_bytes
from service.store.keys import NOWHERE, IdMaker, IdReader, Keys
from service.store.labels import Message, NewLabel, NewLabels, Result
from service.store.packs import ALL_UP_TO, MOST_PROBABLE, VALUES_TOGETHER, Answered, Pack
from service.store.packs import Kept as RowsKept
from service.store.reading import NO_LABEL, Cohort, Position, Reader
from service.store.verification import problems
from tests.service.journals import MODEL, N_CLASSES, Kept, answered, scores

FOREVER = 1e9


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path)
    yield kept
    kept.close()


def reader_of(kept: Kept, wait_seconds: float = FOREVER, name: str = "learner") -> Reader:
    return Reader(kept.journal, MODEL, name, wait_seconds)


def seen(cohort: Cohort) -> list[tuple[int, int, int]]:
    """(number, row, label) of what was passed."""
    return [
        row
        for part in cohort.pairs
        for row in zip(*(a.tolist() for a in (part.numbers, part.rows, part.labels)), strict=True)
    ]


def late(cohort: Cohort) -> list[tuple[int, int]]:
    return [row for part in cohort.late for row in zip(part.numbers.tolist(), part.labels.tolist(), strict=True)]


requests = st.tuples(
    st.integers(0, 10**7), st.integers(1, 5), st.binary(max_size=127), st.sampled_from(["", "", "ios", "São Paulo"])
)
"""When, how many rows, the caller's own id, the segment."""


def run(
    seed: int, revision: int, state: int, signals: set[str], requests: Sequence[tuple[int, int, bytes, str]]
) -> Answered:
    after, row_counts, own_ids, segments = zip(*requests, strict=True)
    rows = sum(row_counts)
    filled = {name: np.full(rows, seed, np.float32) for name in signals}
    made = answered(seed, rows, revision=f"r-{revision}", state=state, signals=filled)
    times = [10**12 + each for each in after]
    return made._replace(times_ms=times, row_counts=row_counts, caller_ids=own_ids, segments=segments)


runs = st.lists(
    st.builds(
        run,
        st.integers(0, 10**6),
        st.integers(1, 3),
        st.integers(0, 2**32 - 1),
        st.sets(st.sampled_from(["density", "input_1"])),
        st.lists(requests, min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=12,
)


@given(runs, st.integers(0, 2**40 - 100))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_pack_comes_back_as_it_was(given_runs: list[Answered], first: int) -> None:
    pack = Pack.of(first, given_runs)
    begun = int(pack.times_ms[0])
    again = Pack.decode(first, begun, pack.revisions, pack.encode())
    start, index = 0, 0
    for run in given_runs:
        chosen = slice(start, start + len(run.kept))
        rows = again.kept.rows(chosen)
        start += len(run.kept)
        signals = {name: values[chosen] for name, values in again.beside.signals.items()}
        assert {name for name, values in signals.items() if not np.isnan(values).any()} == run.signals.keys()
        assert all((signals[name] == values).all() for name, values in run.signals.items())
        assert (rows.logits == run.kept.logits).all()
        assert (rows.probabilities == run.kept.probabilities).all()
        for time_ms, row_count, own, segment in zip(
            run.times_ms, run.row_counts, run.caller_ids, run.segments, strict=True
        ):
            assert again.row_counts[index] == row_count
            assert again.times_ms[index] == max(time_ms, begun)  # as if the clock had not been set back
            assert (again.revisions[again.revision_indices[index]], again.states[index]) == (run.revision, run.state)
            assert (again.caller_ids[index] if again.caller_ids else b"") == own
            assert again.beside.segments[again.beside.of_rows(np.array([index]))[0]] == segment
            index += 1
    assert start == len(again.kept)
    assert again.last == first + index - 1


def test_runs_of_many_requests_are_divided_into_packs_and_no_number_is_left_out(kept: Kept) -> None:
    """As the writer is handed them: what is appended stands for a request each, what is read of them for a run."""
    together = 3000
    one = answered(0, rows=together)
    whole = one._replace(
        **{name: list(getattr(one, name)) * together for name in ("times_ms", "caller_ids", "segments")}
    )
    whole = whole._replace(row_counts=[1] * together)

    def read(waiting: Sequence[int]) -> list[Answered]:
        assert waiting == list(range(2 * together))
        return [whole, whole]

    stream = kept.journal.open_stream(MODEL, "1", "digest", N_CLASSES, read)
    ids = [stream.append(number, 1).decode() for number in range(2 * together)]
    kept.flush()
    assert kept.label([NewLabel(name, 0, 1) for name in ids]) == [Result.RECORDED] * len(ids)
    parts = reader_of(kept, 0).read(most_rows=10**6).pairs
    assert [len(part.numbers) for part in parts] == [together, together]
    assert np.concatenate([part.numbers for part in parts]).tolist() == list(range(2 * together))
    assert (np.concatenate([part.kept.logits for part in parts]) == np.tile(one.kept.logits, (2, 1))).all()


@pytest.mark.parametrize("n_classes", [2, ALL_UP_TO, ALL_UP_TO + 1, 1000])
def test_of_many_classes_the_most_probable_are_kept_and_the_rest_as_one_number(n_classes: int) -> None:
    logits, probabilities = scores(1, 7, n_classes)
    pack = Pack.of(0, [Answered.one(1, "r", 0, logits, probabilities)])
    kept = Pack.decode(0, 1, pack.revisions, pack.encode()).kept
    assert (kept.label == probabilities.argmax(axis=1)).all()
    assert (kept.confidence == probabilities.max(axis=1)).all()
    if n_classes <= ALL_UP_TO:
        assert kept.classes is None
        return
    assert kept.classes is not None and kept.rest is not None
    assert kept.logits.shape == (7, MOST_PROBABLE)
    order = np.argsort(-probabilities, axis=1)[:, :MOST_PROBABLE]
    assert (kept.classes == order).all()
    assert (kept.logits == np.take_along_axis(logits, order, 1)).all()
    whole = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    assert np.allclose(np.logaddexp(np.logaddexp.reduce(kept.logits, axis=1), kept.rest), whole, atol=1e-5)


def test_what_is_kept_of_a_row_does_not_depend_on_those_beside_it() -> None:
    logits, probabilities = scores(1, 3 * VALUES_TOGETHER // 1000, 1000)
    together = RowsKept.of(logits, probabilities)
    singly = RowsKept.joined([RowsKept.of(logits[i : i + 1], probabilities[i : i + 1]) for i in range(len(logits))])
    assert together.encode() == singly.encode()


def test_of_equally_probable_classes_the_first_come_first_and_are_kept() -> None:
    logits, probabilities = scores(1, 50, 300)
    probabilities = np.round(probabilities, 3)
    assert (RowsKept.of(logits, np.full_like(logits, 1 / 300)).classes == np.arange(MOST_PROBABLE)).all()
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :MOST_PROBABLE]
    assert (RowsKept.of(logits, probabilities).classes == order).all()


def test_probabilities_that_are_no_numbers_are_the_last_to_be_kept() -> None:
    logits, probabilities = scores(1, 9, 300)
    probabilities[3, :290] = np.nan
    classes = RowsKept.of(logits, probabilities).classes
    assert classes is not None
    assert set(range(290, 300)) < set(classes[3].tolist())
    others = [row for row in range(9) if row != 3]
    assert (classes[others] == np.argsort(-probabilities[others], axis=1)[:, :MOST_PROBABLE]).all()


def test_classes_that_the_model_rules_out_are_kept_as_nothing() -> None:
    logits, probabilities = scores(1, 2, 300)
    first = np.argsort(-probabilities[0])[:MOST_PROBABLE]
    logits[0] = np.where(np.isin(np.arange(300), first), logits[0], -np.inf)
    rest = RowsKept.of(logits, probabilities).rest
    assert rest is not None
    assert rest[0] == -np.inf and np.isfinite(rest[1])


def test_of_equally_probable_classes_the_first_is_the_label_as_in_the_answer() -> None:
    logits = np.zeros((1, 100), np.float32)
    kept = Pack.of(0, [Answered.one(1, "r", 0, logits, np.full((1, 100), 0.01, np.float32))]).kept
    assert kept.label == [0]


@pytest.mark.parametrize("segment", ["", "android"])
def test_a_pack_that_was_cut_short_is_damaged(segment: str) -> None:
    signals = {"density": np.zeros(3, np.float32)} if segment else {}
    pack = Pack.of(0, [answered(2, 1), answered(1, 3, segment=segment, signals=signals)])
    for lost in (8, 20, 50):
        with pytest.raises(Damaged):
            Pack.decode(0, 0, pack.revisions, pack.encode()[:-lost])


def test_a_pack_that_a_release_without_segments_wrote_is_read() -> None:
    """Two rows of two classes, written when the head's last byte was a truth value."""
    data = (
        bytes.fromhex("02000200000002000000000001000000010005000000000000070000000000000000")
        + np.array([1, 2, 3, 4, 0.25, 0.75, 0.5, 0.5], "<f4").tobytes()
    )
    pack = Pack.decode(3, 1000, ["r-1"], data)
    assert (pack.first, pack.last, pack.times_ms.tolist()) == (3, 4, [1000, 1005])
    assert pack.kept.probabilities.tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert not pack.beside
    assert not pack.beside.of_rows(np.arange(2)).any()
    assert (
        Pack.of(
            3,
            [
                Answered.one(1000, "r-1", 7, pack.kept.logits[:1], pack.kept.probabilities[:1]),
                Answered.one(1005, "r-1", 7, pack.kept.logits[1:], pack.kept.probabilities[1:]),
            ],
        ).encode()
        == data
    )


def test_a_pack_of_a_release_to_come_is_refused() -> None:
    data = bytearray(Pack.of(0, [answered(1)]).encode())
    data[10] = 4
    with pytest.raises(Damaged, match="newer calserve"):
        Pack.decode(0, 0, ["r"], bytes(data))


def test_what_monitors_read_comes_back_with_the_pairs_by_row(kept: Kept) -> None:
    density = np.array([1, 2, 3], np.float32)
    kept.predict(
        answered(0, rows=2, segment="ios"),
        answered(1, rows=3, segment="android", revision="density-1", signals={"density": density}),
        answered(2, rows=1, revision="density-1"),
        answered(3, rows=1),
    )
    kept.flush()
    one, two, three = reader_of(kept, 0).read().pairs
    assert [one.segment_of(row) for row in range(2)] == ["ios", "ios"]
    assert [two.segment_of(row) for row in range(4)] == ["android"] * 3 + [""]
    assert (one.signals, three.signals) == ({}, {})
    assert two.signals["density"].dtype == np.float32
    assert two.signals["density"].tolist()[:3] == [1, 2, 3]
    assert np.isnan(two.signals["density"][3])
    assert (two.signals_of(1), two.signals_of(3)) == ({"density": 2.0}, {})
    assert two.chosen(np.array([2, 0])).signals["density"].tolist() == [3, 1]
    assert three.segment_of(0) == ""


def test_labels_that_come_together_become_what_they_would_become_one_by_one(tmp_path: Path) -> None:
    """Of several keys, streams and packs; ids of the server's, of the caller's and of nobody's; said twice and wrongly."""
    together, singly = Kept(tmp_path / "together"), Kept(tmp_path / "singly")
    names: list[list[str]] = []
    for kept in (together, singly):
        other, own = kept.open_stream("other"), [f"own-{index // 2}" for index in range(12)]  # each given twice
        ids = kept.predict(*(answered(seed, rows=1 + seed % 3, caller_id=b"%d" % seed) for seed in range(90)))
        kept.flush()
        assert kept.journal.keys.rotate()
        kept.flush()
        ids += kept.predict(*(answered(seed, rows=2) for seed in range(60)))
        kept.predict(*(answered(seed, caller_id=name.encode()) for seed, name in enumerate(own)))
        ids += kept.predict(answered(0), stream=other)
        kept.flush()
        ids += kept.predict(*(answered(seed) for seed in range(5)))  # not written yet
        names.append([*ids, *map(str, range(90)), *own, "nobody's", "", ids[0][:-1] + "!"])
    rng = np.random.default_rng(0)
    count = len(names[0])
    chosen = rng.permutation(np.r_[np.arange(count), rng.integers(0, count, size=300)])
    said = [(int(index), int(rng.integers(-1, 3)), int(rng.integers(-1, 5))) for index in chosen]
    messages, rest = [], [NewLabel(names[0][index], row, label) for index, row, label in said]
    while rest:
        size = int(rng.choice([1, 2, 40]))
        messages.append(Message(MODEL, str(rng.choice(["a", "b"])), NewLabels.of(rest[:size])))
        rest = rest[size:]
    each = together.journal.writer.write_now(lambda c: together.labels.record_all(c, messages))
    assert list(map(len, each)) == [len(message.labels.rows) for message in messages]
    became = list(itertools.chain(*each))
    assert became == [singly.label_one(names[1][index], label, row) for index, row, label in said]
    assert set(became) == {result for result in Result if result is not Result.EXPIRED}
    assert together.recorded() == singly.recorded()
    for kept in (together, singly):
        with contextlib.closing(kept.journal.connect()) as connection:
            assert list(problems(connection)) == []
        kept.close()


def test_an_id_is_read_with_the_key_that_made_it_and_nobody_can_make_one_up(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    old = IdMaker(keys.newest, 7).make(2**33 + 5).decode()
    other = Keys(tmp_path / "keys", may_write=False)
    assert keys.rotate()
    new = IdMaker(keys.newest, 8).make(1).decode()
    for known in (keys, other):
        assert IdReader(known).read([old]).tolist() == [[7, 2**33 + 5]]
        assert IdReader(known).read([old, new, new, old]).tolist() == [[7, 2**33 + 5], [8, 1], [8, 1], [7, 2**33 + 5]]
        assert IdReader(known).read([old, new, "x", "", old]).tolist() == [
            [7, 2**33 + 5],
            [8, 1],
            [NOWHERE, NOWHERE],
            [NOWHERE, NOWHERE],
            [7, 2**33 + 5],
        ]
    for position in range(len(new)):
        changed = new[:position] + ("A" if new[position] != "A" else "B") + new[position + 1 :]
        assert IdReader(keys).read([changed, new, changed]).tolist() == [[NOWHERE, NOWHERE], [8, 1], [NOWHERE, NOWHERE]]
    assert IdReader(Keys(tmp_path / "elsewhere")).read([old, new]).tolist() == [[NOWHERE, NOWHERE]] * 2
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600


def test_a_key_is_made_anew_when_it_is_old_and_forgotten_when_nothing_can_bear_it(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    first = keys.newest
    assert not keys.rotate(older_than_seconds=60)
    assert keys.rotate(forget_after_seconds=0)
    assert keys.get(first.number) is None
    assert keys.get(keys.newest.number) == keys.newest


def test_keys_that_cannot_be_read_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("[{}]")
    with pytest.raises(Damaged, match="file of keys"):
        Keys(tmp_path / "keys")


def test_what_became_of_a_label_is_said(kept: Kept) -> None:
    one, three = kept.predict(answered(1), answered(2, rows=3))
    results = kept.label([NewLabel(one, 0, 1), NewLabel(three, 2, 0), NewLabel(three, 1, 3), NewLabel(one, 0, 1)])
    assert results == [Result.RECORDED] * 3 + [Result.DUPLICATE]
    assert kept.label_one(one, 1) is Result.DUPLICATE
    assert kept.label_one(one, 2) is Result.CONFLICT
    assert kept.label_one(one, N_CLASSES) is Result.INVALID_CLASS
    assert kept.label_one(one, -1) is Result.INVALID_CLASS
    for row in (1, -1, 2**31 - 1):
        assert kept.label_one(one, 0, row=row) is Result.UNKNOWN
    assert kept.label_one(three, 0, row=3) is Result.UNKNOWN
    assert kept.label_one(one, 1, model="another") is Result.UNKNOWN
    assert set(kept.recorded().values()) == {0, 1, 3}


def test_a_label_that_contradicts_is_kept_for_an_audit_with_who_sent_it(kept: Kept) -> None:
    (one,) = kept.predict(answered(1))
    kept.label_one(one, 1, producer="honest")
    assert [kept.label_one(one, 2, producer="other") for _ in range(2)] == [Result.CONFLICT] * 2
    with kept.journal.reading() as connection:
        query = "SELECT label, name FROM conflicts JOIN producers ON producers.producer = conflicts.producer"
        assert connection.execute(query).fetchall() == [(2, "other")]
    assert list(kept.recorded().values()) == [1]


def test_contradicting_labels_in_one_message_leave_the_first(kept: Kept) -> None:
    (one,) = kept.predict(answered(1))
    assert kept.label([NewLabel(one, 0, 1), NewLabel(one, 0, 2)]) == [Result.RECORDED, Result.CONFLICT]


def test_a_prediction_is_found_by_its_callers_own_id_if_that_was_given_once(kept: Kept) -> None:
    kept.predict(answered(1, caller_id=b"once"), answered(2, caller_id=b"twice"), answered(3, caller_id=b"twice"))
    assert kept.label_one("once", 1) is Result.RECORDED
    assert kept.label_one("twice", 1) is Result.UNKNOWN
    assert kept.label_one("once", 1, model="another") is Result.UNKNOWN
    assert kept.label_one("never", 1) is Result.UNKNOWN


def test_a_label_may_come_before_its_prediction_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.store.journal, "FLUSH_SECONDS", FOREVER)
    kept = Kept(tmp_path)
    one, _ = kept.predict(answered(1), answered(2, caller_id=b"own"))
    assert kept.label_one(one, 1, row=1) is Result.UNKNOWN  # its rows are known, so it is there
    assert kept.label_one(one, 1) is Result.RECORDED
    assert kept.label_one("own", 1) is Result.RECORDED
    assert len(seen(reader_of(kept).read())) == 2
    kept.close()


def test_a_label_that_another_process_must_still_write_the_prediction_of_is_joined_when_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.store.journal, "FLUSH_SECONDS", FOREVER)
    learner, worker = Kept(tmp_path), Kept(tmp_path, learns=False)
    worker.predict(answered(0))
    worker.flush()
    (one,) = worker.predict(answered(1))
    assert learner.label_one(one, 2) is Result.RECORDED
    assert seen(reader_of(learner, 0).read()) == [(0, 0, NO_LABEL)]
    worker.flush()
    assert seen(reader_of(learner, 0).read())[1:] == [(1, 0, 2)]
    worker.close()
    learner.close()


def test_many_callers_share_one_commit(kept: Kept) -> None:
    ids = kept.predict(*map(answered, range(300)))
    kept.flush()

    async def label(prediction_id: str) -> Result:
        message = Message(MODEL, "", NewLabels.of([NewLabel(prediction_id, 0, 1)]))
        (result,) = await kept.journal.writer.write_piece(kept.labels.record_all, message)
        return result

    async def all_of_them() -> list[Result]:
        return await asyncio.gather(*map(label, ids))

    before = kept.journal.writer.commits
    assert asyncio.run(all_of_them()) == [Result.RECORDED] * 300
    assert kept.journal.writer.commits - before <= 30


def test_work_that_fails_takes_nothing_with_it(kept: Kept) -> None:
    (one,) = kept.predict(answered(1))

    def fail(connection: Connection) -> None:
        kept.journal.write_waiting(connection)
        raise KeyError("a defect")

    async def together() -> list[object]:
        labels = NewLabels.of([NewLabel(one, 0, 1)])
        good = kept.journal.writer.write(lambda c: kept.labels.record(c, MODEL, "", labels))
        return await asyncio.gather(kept.journal.writer.write(fail), good, return_exceptions=True)

    failed, recorded = asyncio.run(together())
    assert isinstance(failed, KeyError)
    assert recorded == [Result.RECORDED]
    assert seen(reader_of(kept).read()) == [(0, 0, 1)]


def test_pieces_of_several_callers_are_done_together_and_each_alone_if_one_is_bad(kept: Kept) -> None:
    calls: list[list[int]] = []

    def invert(_: Connection, pieces: Sequence[int]) -> list[float]:
        calls.append(list(pieces))
        return [1 / piece for piece in pieces]

    async def together(*pieces: int) -> list[object]:
        begun, go_on = threading.Event(), threading.Event()

        def hold(_: Connection) -> None:
            begun.set()
            assert go_on.wait(20)

        held = asyncio.ensure_future(kept.journal.writer.write(hold))
        assert await asyncio.to_thread(begun.wait, 20)
        waiting = [asyncio.ensure_future(kept.journal.writer.write_piece(invert, piece)) for piece in pieces]
        asyncio.get_running_loop().call_soon(go_on.set)  # when all of them wait for the writer
        await held
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert asyncio.run(together(1, 2, 4)) == [1, 0.5, 0.25]
    failed, half = asyncio.run(together(0, 2))
    assert isinstance(failed, ZeroDivisionError)
    assert half == 0.5
    assert calls == [[1, 2, 4], [0, 2], [0], [2]]


def test_what_does_not_fit_in_the_queue_is_counted_and_told_to_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.store.journal, "FLUSH_SECONDS", FOREVER)
    kept = Kept(tmp_path, queue_bytes=1000)
    ids = [kept.stream.append(answered(seed, rows=2), 2) for seed in range(5)]
    assert list(map(bool, ids)) == [True, True, False, False, False]
    assert kept.stream.lost_rows == {"full": 6}
    kept.flush()
    kept.predict(answered(9))
    kept.flush()
    assert kept.journal.queued_bytes == 0
    assert reader_of(kept, 0).read().dropped == 6
    kept.close()


def test_what_comes_while_a_transaction_is_made_is_written_behind_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.store.journal, "FLUSH_SECONDS", FOREVER)
    kept = Kept(tmp_path)
    ids = kept.predict(answered(0), answered(1))
    kept.stream.lost_rows["full"] += 5

    def twice(connection: Connection, *, fail: bool) -> None:
        kept.journal.write_waiting(connection)
        ids.extend(kept.predict(answered(len(ids))))
        kept.journal.write_waiting(connection)
        if fail:
            raise KeyError("a defect")

    with pytest.raises(KeyError):
        kept.journal.writer.write_now(lambda c: twice(c, fail=True))
    kept.journal.writer.write_now(lambda c: twice(c, fail=False))
    assert kept.label([NewLabel(known, 0, index % 4) for index, known in enumerate(ids)]) == [Result.RECORDED] * 4
    cohort = reader_of(kept).read()
    assert seen(cohort) == [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3)]
    assert cohort.dropped == 5
    times = np.concatenate([part.times_ms for part in cohort.pairs])
    assert times.tolist() == [answered(seed).times_ms[0] for seed in range(4)]
    kept.close()


def test_predictions_are_written_by_themselves_within_a_moment(kept: Kept) -> None:
    kept.predict(answered(1))
    end = time.monotonic() + 20
    while kept.journal.queued_bytes:
        assert time.monotonic() < end
    assert kept.stream.kept_rows == 1


def test_pairs_are_passed_in_the_order_of_the_predictions_and_none_before_its_time(kept: Kept) -> None:
    now = int(1000 * time.time())
    ids = kept.predict(*(answered(seed, time_ms=now) for seed in range(4)))
    reader = reader_of(kept)
    kept.label_one(ids[2], 2)
    assert not reader.read()
    kept.label_one(ids[0], 0)
    cohort = reader.read()
    assert seen(cohort) == [(0, 0, 0)]
    reader.commit(cohort)
    kept.label_one(ids[1], 1)
    assert seen(reader.read()) == [(1, 0, 1), (2, 0, 2)]
    assert seen(reader.read(most_rows=1)) == [(1, 0, 1)]


def test_who_is_waited_for_too_long_is_missing_and_late_when_it_comes(kept: Kept) -> None:
    now = int(1000 * time.time())
    old = now - 2 * 3600 * 1000
    ids = kept.predict(
        *(answered(seed, time_ms=old if seed < 3 else now, revision=f"r-{seed % 2}") for seed in range(5))
    )
    reader = reader_of(kept, wait_seconds=3600)
    kept.label_one(ids[1], 1)
    kept.label_one(ids[4], 0)
    cohort = reader.read()
    assert seen(cohort) == [(0, 0, NO_LABEL), (1, 0, 1), (2, 0, NO_LABEL)]
    assert [part.revision for part in cohort.pairs] == ["r-0", "r-1", "r-0"]
    assert (cohort.missing, late(cohort)) == (2, [])
    reader.commit(cohort)
    kept.label_one(ids[2], 2)
    kept.label_one(ids[0], 3)
    kept.label_one(ids[3], 3)
    cohort = reader.read()
    assert seen(cohort) == [(3, 0, 3), (4, 0, 0)]
    assert late(cohort) == [(0, 3), (2, 2)]
    reader.commit(cohort)
    assert not reader.read()


def test_a_replay_gives_every_step_again_though_other_labels_have_come_since(kept: Kept) -> None:
    rng = np.random.default_rng(0)
    ids = kept.predict(*(answered(seed, rows=1 + seed % 3, time_ms=10**12 + seed) for seed in range(60)))
    reader, steps = reader_of(kept, 0), []
    for _ in range(20):
        chosen = rng.choice(60, 8)
        kept.label([NewLabel(ids[i], int(rng.integers(0, 1 + i % 3)), int(rng.integers(0, 4))) for i in chosen])
        cohort = reader.read(most_rows=7)
        if cohort:
            reader.commit(cohort, b"%d" % cohort.number)
            steps.append(cohort)
    kept.flush()
    again = list(reader_of(kept, 0).replay())
    assert [seen(step) for step in again] == [seen(step) for step in steps]
    assert [late(step) for step in again] == [late(step) for step in steps]
    assert sum(map(len, map(late, steps))) > 0
    assert sum(map(len, map(seen, steps))) == sum(1 + seed % 3 for seed in range(60))


def test_a_replay_begins_where_what_is_kept_begins(kept: Kept) -> None:
    reader, steps = reader_of(kept, 0), []
    for seed in range(6):
        kept.predict(answered(seed, time_ms=10**12 if seed < 4 else int(1000 * time.time()) - 1000))
        kept.flush()
        reader.commit(step := reader.read())
        steps.append(step)
    kept.journal.writer.write_now(lambda c: prune(c, Retention(seconds=3600)))
    assert [seen(step) for step in reader.replay()] == [seen(step) for step in steps[4:]]


def test_state_and_position_are_written_together_and_by_one_reader(kept: Kept) -> None:
    (one,) = kept.predict(answered(1))
    kept.label_one(one, 1)
    first, second = reader_of(kept), reader_of(kept)
    assert first.state() == (Position(), 0, b"")
    cohort = first.read()
    same = second.read()
    first.commit(cohort, b"state")
    with pytest.raises(Stale, match="read again"):
        second.commit(same, b"another")
    assert second.state() == (cohort.end, 1, b"state")
    assert reader_of(kept, name="monitor").state()[1] == 0


def test_a_reader_that_found_nothing_looks_again_when_something_was_written_or_waited_for_enough(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, looks = reader_of(kept, wait_seconds=60), []
    look = kept.journal.packs.load
    monkeypatch.setattr(kept.journal.packs, "load", lambda *given: looks.append(1) or look(*given))
    (waits,) = kept.predict(answered(1, time_ms=int(1000 * time.time())))
    kept.flush()
    assert not reader.read()
    seen_once = len(looks)
    assert not reader.read()
    assert len(looks) == seen_once
    kept.predict(answered(2, time_ms=int(1000 * time.time())))
    kept.flush()
    assert not reader.read()
    assert len(looks) > seen_once
    later = time.time() + 61
    monkeypatch.setattr(reading.time, "time", lambda: later)
    assert seen(reader.read()) == [(0, 0, NO_LABEL), (1, 0, NO_LABEL)]
    kept.label_one(waits, 1)
    assert seen(reader.read()) == [(0, 0, 1), (1, 0, NO_LABEL)]


def test_who_still_reads_is_waited_for_at_the_close(tmp_path: Path) -> None:
    """A look that is called off goes on in its thread, and a connection that is closed under it ends the process."""
    kept = Kept(tmp_path)
    closing = threading.Thread(target=kept.close)
    with kept.journal.reading() as connection:
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
        assert connection.execute("SELECT 1").fetchone() == (1,)
    closing.join()


def test_packs_that_are_read_again_are_read_once_and_so_many_bytes_are_remembered(kept: Kept) -> None:
    for seed in range(6):
        kept.predict(answered(seed, rows=100))
        kept.flush()
    with kept.journal.reading() as connection:
        query = f"SELECT {PACK_COLUMNS} FROM packs ORDER BY pack"  # noqa: S608
        rows = [PackRow(*found) for found in connection.execute(query)]
        packs = RecentPacks(most_bytes=3 * 100 * N_CLASSES * 8)
        loaded = [packs.load(connection, row) for row in rows]
        assert [packs.load(connection, row) is pack for row, pack in zip(rows[-2:], loaded[-2:], strict=True)] == [
            True,
            True,
        ]
        assert packs.load(connection, rows[0]) is not loaded[0]
        alone = RecentPacks(most_bytes=1)
        assert alone.load(connection, rows[0]) is alone.load(connection, rows[0])


def test_a_reader_that_holds_rows_back_passes_them_when_their_time_has_come(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(kept.journal, MODEL, "shadow", wait_seconds=60, hold_seconds=120)
    (labelled,) = kept.predict(answered(1, time_ms=int(1000 * time.time())))
    kept.flush()
    kept.label_one(labelled, 1)
    now = time.time()
    assert not reader.read()
    for seconds, passed in ((61, False), (121, True)):
        monkeypatch.setattr(reading.time, "time", lambda s=seconds: now + s)
        assert bool(reader.read()) == passed


def test_another_models_predictions_are_not_read(kept: Kept) -> None:
    other = kept.open_stream("other")
    (one,), (two,) = kept.predict(answered(1)), kept.predict(answered(2), stream=other)
    kept.label_one(one, 1)
    kept.label_one(two, 2, model="other")
    assert seen(reader_of(kept).read()) == [(0, 0, 1)]
    assert [part.stream.model for part in Reader(kept.journal, "other", "learner", 1).read().pairs] == ["other"]


class Interrupted:
    """A connection; after each of its queries somebody else has written a label."""

    def __init__(self, kept: Kept) -> None:
        self._kept, self._connection = kept, kept.journal.connect()
        self.close = self._connection.close

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def execute(self, *query: object) -> object:
        found = self._connection.execute(*query)  # type: ignore[arg-type]
        self._kept.label_one(self._kept.predict(answered(1))[0], 1)
        return found


def test_a_journal_is_found_whole_while_it_is_written(kept: Kept) -> None:
    connection = Interrupted(kept)
    assert list(problems(connection)) == []  # type: ignore[arg-type]
    connection.close()


@pytest.mark.parametrize("bound", [Retention(seconds=3600), Retention(bytes=1)], ids=["age", "bytes"])
def test_old_predictions_are_forgotten_with_their_labels_a_few_at_a_time(kept: Kept, bound: Retention) -> None:
    with kept.journal.reading() as connection:
        empty = used_bytes(connection)
    ids = []
    for seed in range(40):
        ids += kept.predict(answered(seed, time_ms=10**12, caller_id=b"own-%d" % seed))
        kept.flush()
    kept.label([NewLabel(prediction_id, 0, 1) for prediction_id in ids])
    steps = 0
    while kept.journal.writer.write_now(lambda c: prune(c, bound)):
        steps += 1
        assert kept.label_one(ids[-1], 1) is Result.DUPLICATE
    assert steps == 2
    assert kept.recorded() == {}
    assert [kept.label_one(name, 1) for name in (ids[0], "own-3")] == [Result.EXPIRED, Result.UNKNOWN]
    with kept.journal.reading() as connection:
        assert connection.execute("SELECT count(*) FROM caller_ids").fetchone() == (0,)
        assert used_bytes(connection) < empty + 16_000
    kept.journal.close()
    again = Kept(kept.journal.path.parent)
    (new,) = again.predict(answered(99))
    assert again.label_one(new, 1) is Result.RECORDED
    again.close()


def test_the_journal_forgets_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.store.journal, "PRUNE_SECONDS", 0.01)
    kept = Kept(tmp_path, retention=Retention(seconds=3600))
    (one,) = kept.predict(answered(1, time_ms=10**12))
    kept.flush()
    end = time.monotonic() + 20
    while kept.label_one(one, 1) is not Result.EXPIRED:
        assert time.monotonic() < end
    kept.close()
