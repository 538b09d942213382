"""What was acknowledged is there: after kill -9, after a power cut, on a disk that is full, fails or flips bits."""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import service.store.database
import service.store.journal_tables
import service.store.writer
from service.errors import Damaged, NotReady, Refused
from service.store.database import open_database
from service.store.journal_tables import SCHEMA, SCHEMA_VERSION
from service.store.labels import NewLabel, Result
from service.store.maintenance import export
from service.store.reading import Reader
from tests.service import power_cut
from tests.service.journals import MODEL, Kept, answered

LEAST_ACKNOWLEDGED = 100
"""A run with fewer proves nothing."""
CUTS = 40


@pytest.fixture(autouse=True)
def short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is written back often, so that cuts and errors meet that too."""
    monkeypatch.setattr(service.store.database, "LOG_PAGES", 50)


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true value of the condition; the test fails if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
    pytest.fail("nothing came of it in time")


@contextmanager
def flood(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that records labels in this folder until it is killed."""
    command = [sys.executable, "-m", "tests.service.label_flood", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def told(process: subprocess.Popen[str]) -> tuple[int, ...]:
    """The next acknowledged label; empty for a refusal."""
    words = process.stdout.readline().split()  # type: ignore[union-attr]
    assert words, "the process ended by itself"
    return () if words[0] == "refused" else tuple(map(int, words))


def recorded(folder: Path) -> dict[tuple[int, int], int]:
    kept = Kept(folder)
    found = {place[:2]: label for place, label in kept.recorded().items()}
    kept.close()
    return found


def test_every_acknowledged_label_survives_kill_9_and_none_is_there_twice(tmp_path: Path) -> None:
    history: dict[tuple[int, int], int] = {}
    for _ in range(4):
        with flood(tmp_path) as process:
            for _ in range(LEAST_ACKNOWLEDGED):
                stream, number, label = told(process)
                assert (stream, number) not in history
                history[stream, number] = label
            process.kill()
            for line in process.stdout or ():
                stream, number, label = map(int, line.split())
                history[stream, number] = label
        found = recorded(tmp_path)
        assert len(history) >= LEAST_ACKNOWLEDGED
        assert history.items() <= found.items()


def test_a_full_disk_refuses_labels_and_takes_them_again_when_there_is_room(tmp_path: Path) -> None:
    history: dict[tuple[int, int], int] = {}

    def acknowledge(count: int) -> None:
        while count:
            if said := told(process):
                history[said[:2]] = said[2]  # type: ignore[index]
                count -= 1

    with flood(tmp_path) as process:
        acknowledge(LEAST_ACKNOWLEDGED)
        size = (tmp_path / "journal.sqlite-wal").stat().st_size
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        until(lambda: not told(process))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        acknowledge(LEAST_ACKNOWLEDGED)
    assert history.items() <= recorded(tmp_path).items()


def labelled(folder: Path, disk: power_cut.Disk) -> None:
    """Predictions and labels, of which those that are acknowledged are told to the disk."""
    kept = Kept(folder)
    for seed in range(LEAST_ACKNOWLEDGED + 20):
        (prediction_id,) = kept.predict(answered(seed))
        number = seed
        assert kept.label_one(prediction_id, seed % 4) is Result.RECORDED
        disk.acknowledge(((kept.stream.row.stream, number, 0), seed % 4))
    kept.close()


def after_cuts(folder: Path, work: Callable[[Path, power_cut.Disk], None]) -> Iterator[tuple[int, int, int]]:
    """Of each cut and each fate of unsynced writes: how many labels were acknowledged, are lost, are there besides."""
    live = folder / "live"
    with power_cut.recorded(live) as disk:
        work(live, disk)
    assert len(disk.acknowledged(len(disk.events))) >= LEAST_ACKNOWLEDGED
    first = next(index for index, event in enumerate(disk.events) if event.kind == "acknowledged")
    draw = random.Random(1)
    for cut in sorted(draw.sample(range(first + 1, len(disk.events)), CUTS)):
        for unsynced in ("drop", "torn", "keep"):
            found = _reopened(folder / f"{cut}-{unsynced}", live, disk.after_cut(cut, unsynced, cut))
            acknowledged = dict(disk.acknowledged(cut))
            lost = acknowledged.items() - found.items()
            yield len(acknowledged), len(lost), len(found) - len(acknowledged)


def _reopened(folder: Path, live: Path, files: dict[str, bytes]) -> dict[tuple[int, int, int], int]:
    folder.mkdir()
    shutil.copy(live / "journal.keys", folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with power_cut.recorded(folder):  # nothing to wait for
        kept = Kept(folder)
        found = kept.recorded()
        kept.close()
    return found


def test_every_acknowledged_label_survives_a_power_cut_at_any_moment(tmp_path: Path) -> None:
    for _acknowledged, lost, besides in after_cuts(tmp_path, labelled):
        assert lost == 0
        assert besides <= 1  # written and not yet told


def test_the_power_cuts_would_show_what_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.store.database, "SYNCHRONOUS", "NORMAL")
    losses = [lost for _, lost, _ in after_cuts(tmp_path, labelled)]
    assert sum(lost > 0 for lost in losses) >= CUTS


def test_a_database_that_cannot_be_durable_is_refused() -> None:
    with pytest.raises(Refused, match="journal_mode=wal and synchronous=FULL, got \\('memory'"):
        open_database(Path(":memory:"), "journal", SCHEMA, SCHEMA_VERSION)


@pytest.mark.parametrize(
    ("kind", "code"), [("sync", power_cut.IOERR_FSYNC), ("write", power_cut.FULL)], ids=["fsync", "full"]
)
def test_after_an_error_of_the_disk_writes_are_refused_until_all_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    monkeypatch.setattr(service.store.writer, "RETRY_SECONDS", 0.01)
    with power_cut.recorded(tmp_path) as disk:
        kept = Kept(tmp_path)
        first, second, third = kept.predict(answered(1), answered(2), answered(3))
        assert kept.label_one(first, 1) is Result.RECORDED
        before = kept.recorded()
        disk.fail = lambda happening, _: code if happening == kind else 0
        with pytest.raises(NotReady, match="cannot be written now") as caught:
            kept.label_one(second, 2)
        assert caught.value.detail_reason == "STORE_READ_ONLY"
        assert not kept.journal.writer.writable
        with pytest.raises(NotReady):
            kept.label_one(third, 3)
        assert kept.stream.append(answered(4), 1) == b""
        assert kept.stream.lost_rows["disk"] == 1
        disk.fail = lambda *_: 0
        until(lambda: kept.journal.writer.writable)
        assert before.items() <= kept.recorded().items()
        assert kept.label_one(second, 2) in {Result.RECORDED, Result.DUPLICATE}
        assert kept.label_one(third, 3) is Result.RECORDED
        kept.close()


def test_a_journal_found_damaged_after_an_error_of_the_disk_stays_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service.store.writer, "RETRY_SECONDS", 0.01)
    with power_cut.recorded(tmp_path) as disk:
        kept = Kept(tmp_path)
        (first,) = kept.predict(answered(1))
        kept.label_one(first, 1)
        kept.journal.writer.write_now(lambda c: c.execute("UPDATE labels SET label = 2") and None)
        disk.fail = lambda happening, _: power_cut.IOERR_FSYNC if happening == "sync" else 0
        with pytest.raises(NotReady):
            kept.label_one(first, 1)
        disk.fail = lambda *_: 0
        until(lambda: "labels of the journal are damaged" in caplog.text)
        assert not kept.journal.writer.writable
        kept.close()


def filled(folder: Path) -> None:
    """Packs, labels, a conflict and a reader, all in the file itself."""
    kept = Kept(folder)
    ids = kept.predict(*(answered(seed, rows=3, caller_id=b"own-%d" % seed) for seed in range(300)))
    kept.label([NewLabel(prediction_id, row, row) for prediction_id in ids for row in range(3)], producer="somebody")
    kept.label_one(ids[0], 3)
    reader = Reader(kept.journal, MODEL, "learner", 1.0)
    reader.commit(reader.read(100), b"state" * 100)
    kept.close()


def content(folder: Path) -> tuple[Any, ...]:
    """All that anybody can read of a journal."""
    kept = Kept(folder)
    try:
        state = Reader(kept.journal, MODEL, "learner", 1.0).state()
        return kept.recorded(), list(export(folder, MODEL)), state
    finally:
        kept.close()


def served_wrong(folder: Path, count: int) -> tuple[int, int]:
    """Of journals with some bytes changed: how many were refused, and how many gave something else."""
    filled(folder / "good")
    wanted, good = content(folder / "good"), (folder / "good" / "journal.sqlite").read_bytes()
    refused = wrong = 0
    for seed in range(count):
        draw, damaged = random.Random(seed), bytearray(good)
        start = draw.randrange(100, len(good))
        for index in range(start, min(len(good), start + draw.choice((1, 4, 64)))):
            damaged[index] ^= draw.randrange(1, 256)
        place = folder / str(seed)
        place.mkdir()
        shutil.copy(folder / "good" / "journal.keys", place)
        (place / "journal.sqlite").write_bytes(damaged)
        try:
            wrong += content(place) != wanted
        except Damaged:
            refused += 1
    return refused, wrong


def test_changed_bytes_are_found_when_the_journal_is_opened(tmp_path: Path) -> None:
    refused, wrong = served_wrong(tmp_path, 60)
    assert wrong == 0
    assert refused >= 10  # the others hit bytes that mean nothing


def test_without_checksums_changed_bytes_would_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.store.journal_tables.zlib, "crc32", lambda *_: 0)
    assert served_wrong(tmp_path, 60)[1] > 0
