"""What survives: checksums that see damage, a schema that is not guessed at, files that appear whole."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from service import errors
from service.store.blobs import Blobs
from service.store.catalogue import ActivationRow, Catalogue, OperationRow, RevisionRow
from service.store.files import write_whole
from service.store.following import seconds_left


def revision(model: str = "m", artifact: str = "a") -> RevisionRow:
    return RevisionRow(model, 0, "platt", "{}", "digest", artifact, "golden", 10, 3, None, 1.5, ["a note"])


def operation(name: str = "op-1", time: float = 1.0) -> OperationRow:
    return OperationRow(name, "fit", "m", "fit platt", "running", time)


def reopened(path: Path, damage: str = "SELECT 1") -> Catalogue:
    connection = sqlite3.connect(path)
    connection.execute(damage)
    connection.commit()
    connection.close()
    return Catalogue(path)


def test_rows_come_back_as_they_were_after_reopening(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    stored = catalogue.finish_fit(revision(), operation())
    catalogue.record_activation(ActivationRow("m", "digest", stored.revision, 2.5))
    catalogue.close()
    catalogue = reopened(tmp_path / "c")
    assert catalogue.revision("m", "platt-1") == stored
    assert catalogue.operations()[0].result == {"revision": "platt-1"}
    assert catalogue.activations("m", "digest") == [ActivationRow("m", "digest", "platt-1", 2.5)]
    catalogue.close()


def test_numbers_are_counted_per_model_and_never_reused(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    first = catalogue.finish_fit(revision(), operation())
    assert catalogue.finish_fit(revision("other", "b"), operation()).revision == "platt-1"
    catalogue.delete_revision(first)
    assert catalogue.finish_fit(revision(), operation()).revision == "platt-2"
    catalogue.close()


def test_deleting_names_the_blobs_that_no_other_revision_uses(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    first, second = (catalogue.finish_fit(revision(), operation()) for _ in range(2))
    assert catalogue.delete_revision(first) == set()
    assert catalogue.delete_revision(second) == {"a", "golden"}
    catalogue.close()


@pytest.mark.parametrize("name", ["platt-2", "isotonic-1", "platt-01", "platt-", "platt-" + "9" * 40, "", "platt-١"])
def test_a_name_that_no_revision_has_is_not_found(tmp_path: Path, name: str) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.finish_fit(revision(), operation())
    with pytest.raises(errors.NotFound):
        catalogue.revision("m", name)
    catalogue.close()


@pytest.mark.parametrize("table", ["revisions", "operations"])
def test_a_row_that_was_changed_on_disk_is_damaged_and_not_served(tmp_path: Path, table: str) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue.finish_fit(revision(), operation())
    catalogue.close()
    catalogue = reopened(tmp_path / "c", f"UPDATE {table} SET row = replace(row, '\"m\"', '\"n\"')")  # noqa: S608
    with pytest.raises(errors.Damaged, match=f"table {table} is damaged"):
        catalogue.revisions("m") if table == "revisions" else catalogue.operations()
    catalogue.close()


def test_a_store_of_a_newer_calserve_is_refused(tmp_path: Path) -> None:
    Catalogue(tmp_path / "c").close()
    with pytest.raises(errors.Refused, match="written by a newer calserve"):
        reopened(tmp_path / "c", "PRAGMA user_version = 99")


def test_a_file_that_is_no_database_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"\x00" * 5000)
    with pytest.raises(errors.Damaged, match="catalogue c cannot be read"):
        Catalogue(tmp_path / "c")


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    bad = operation()
    object.__setattr__(bad, "create_time", "now")  # refused by the STRICT table, after the revision went in
    with pytest.raises(sqlite3.IntegrityError):
        catalogue.finish_fit(revision(), bad)
    assert catalogue.revisions("m") == []
    catalogue.close()


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    catalogue._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(errors.NotReady) as caught:
        catalogue.put_operation(operation())
    assert caught.value.detail_reason == "STORE_READ_ONLY"
    catalogue.close()


def test_old_operations_are_forgotten_newest_kept(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "c")
    for number in range(5):
        catalogue.put_operation(operation(f"op-{number}", number))
    catalogue.prune_operations(keep=2)
    assert [row.operation for row in catalogue.operations()] == ["op-4", "op-3"]
    catalogue.close()


def test_a_blob_is_checked_against_its_name_at_every_read(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest = blobs.put(b"some bytes")
    assert blobs.get(digest) == b"some bytes"
    (tmp_path / digest).write_bytes(b"same bytes")
    with pytest.raises(errors.Damaged, match="another sha256"):
        blobs.get(digest)
    blobs.delete(digest)
    with pytest.raises(errors.Damaged, match="missing"):
        blobs.get(digest)


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="gone"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(("now", "left"), [(7.25, 0.75), (8.0, 1.0), (7.9999, 1.0001), (8.0001, 0.9999)])
def test_those_who_follow_the_store_look_at_the_same_moments(now: float, left: float) -> None:
    assert seconds_left(1.0, now) == pytest.approx(left)
