"""The first step of the examples: what is fetched, gathered and written. No network: pip is a stand-in."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from examples import fragments, step1_prepare
from examples.fragments import Fragments, extension_classes, gather, model_inputs, paths_by_class, walk
from examples.step1_prepare import REQUIREMENT, WHEEL_NAME, load, prepare
from service.inference.repository import ModelFolder

QUIET = Console(quiet=True)
EVERY_BYTE = bytes(range(256))
CLASS_NAMES = ["c", "python", "matlab", "objectivec", "txt", "cpp"]
KNOWLEDGE_BASE = {
    "c": {"extensions": ["c"]},
    "python": {"extensions": ["py", "pyi"]},
    "matlab": {"extensions": ["m"]},
    "objectivec": {"extensions": ["m", "mm"]},
    "txt": {"extensions": ["txt"]},
    "cpp": {"extensions": ["cc"]},
    "h": {"extensions": ["h"]},  # a format that the model does not name
}
MARK = re.compile(rb"<([a-z]+)-(\d+):(\d+)>")


def marked(extension: str, number: int, size: int = 2000) -> bytes:
    """Contents of which any 512 bytes tell the file they are from."""
    return b"".join(f"<{extension}-{number}:{i}>\n".encode() for i in range(size))[:size]


def write_files(folder: Path, extension: str, count: int, size: int = 2000) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.{extension}" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(marked(extension, number, size))
    return [str(path) for path in paths]


def content_of(row: np.ndarray) -> bytes:
    """The fragment that a model input was made of, white space at its ends aside."""
    first = row[:1024]
    return first[first != 256].astype(np.uint8).tobytes()


def sources_of(found: Fragments) -> list[tuple[str, int]]:
    """Extension and number of the marked file that each fragment is from."""
    matches = [MARK.search(content_of(row)) for row in found.inputs]
    return [(match[1].decode(), int(match[2])) for match in matches if match]


# ---------------------------------------------------------------------------------------------------- the model's input


def test_an_input_is_the_stripped_start_padded_right_and_the_stripped_end_padded_left() -> None:
    row = model_inputs([b" \n ab\t"])[0]
    assert row.dtype == np.int32
    assert row.shape == (2048,)
    np.testing.assert_array_equal(row[:1024], [*b"ab\t"] + [256] * 1021)
    np.testing.assert_array_equal(row[1024:], [256] * 1019 + [*b" \n ab"])


@pytest.mark.parametrize(
    ("content", "sha256"),
    [
        (
            b" \t\r\n\x0b\x0c#!/bin/sh\necho hello\n\n",
            "94ec7fdb198ac690abc3ed1c6afdd450b15e1b38e0676e7ce7cc451379f6c7a8",
        ),
        (b"\x00\x85\xa0text\xa0\x85\x00", "21c90c57fa670aa30b9b9feb64203df45be6e4836677f089a3213d3f6821b41b"),
        (b"  " + 2 * EVERY_BYTE[:-1], "554ac159eee3bee3fc39ab12796fb7040280a12a3167e11ce2a1cfdb4990c436"),
        (4 * EVERY_BYTE, "901da7bde2e794ff701e103428c7f7f483304d93b90ba6e263262ed8aca2f13e"),
        (4 * EVERY_BYTE + b"x", "4726440a7bcb921a35d7e45594e5ce86f2b3df00b068a33c20c51e8b809f3d64"),
        (9000 * b"ab" + b"\n" + 3 * EVERY_BYTE, "34cfdb172fd541c64e1cd47d5692e66063b32b6e0f950e46b67e5964f99cb6b7"),
        (b" " * 4096 + 8 * EVERY_BYTE, "5a1245459d4e3d59d31ed9317ebd80a2912d33e8be6ccb7eaf03c0a02291e4d5"),
        (8 * EVERY_BYTE + b"\n" * 4096, "f093baaa38cfcb81a7cf3e147c919a5e4631d048679326202d89491cb34a9734"),
        (
            b" " * 4000 + EVERY_BYTE + b"\t" * 4000,
            "9eb70121e57c934fddcacd73e90abf9431ed1006d535c54a37c03a1a6d7c74c7",
        ),
        (b" \n" * 300, "8b906b894fb8ffc2a9461f9af0514af6bb1f701ab29ee78820933aba05c151ab"),
    ],
    ids=[
        "a short script",
        "bytes that are white space only as text",
        "512 bytes",
        "1024 bytes",
        "1025 bytes",
        "longer than a block",
        "a block of white space first",
        "a block of white space last",
        "text in the first block and not in the last",
        "white space alone",
    ],
)
def test_an_input_is_the_one_that_magika_itself_makes(content: bytes, sha256: str) -> None:
    """Golden numbers: sha256 of beg + end, as little-endian int32, from magika 1.0.3.

    Made by `Magika._extract_features_from_seekable` with beg_size 1024, mid_size 0, end_size 1024, padding_token 256,
    block_size 4096 and use_inputs_at_offsets false, as the config of standard_v3_3 has them.
    """
    assert hashlib.sha256(model_inputs([content])[0].astype("<i4").tobytes()).hexdigest() == sha256


# ---------------------------------------------------------------------------------------------- extensions and the walk


def test_an_extension_means_a_class_only_where_one_of_the_models_classes_claims_it() -> None:
    meaning = extension_classes(KNOWLEDGE_BASE, CLASS_NAMES)
    assert {key: meaning[key] for key in ("c", "py", "pyi", "mm", "cc")} == {
        "c": 0,
        "py": 1,
        "pyi": 1,
        "mm": 3,
        "cc": 5,
    }
    assert meaning["hpp"] == 5  # the table of this project
    assert not {"m", "h", "txt"} & meaning.keys()  # claimed twice, by no class of the model, of any format


def test_an_extension_is_either_given_a_meaning_or_left_out() -> None:
    assert not fragments.SAME_FORMAT.keys() & fragments.LEFT_OUT.keys()


def walked(*roots: Path, max_entries: int = 1000, max_seconds: float = 60.0) -> list[str]:
    return [name for _, name in walk(roots, max_entries=max_entries, max_seconds=max_seconds)]


def test_the_walk_takes_the_upper_levels_of_all_roots_first_and_each_folder_by_name(tmp_path: Path) -> None:
    write_files(tmp_path / "one" / "a" / "deep", "py", 1)
    write_files(tmp_path / "one", "c", 3)
    write_files(tmp_path / "two", "js", 2)
    assert walked(tmp_path / "one", tmp_path / "two") == ["0.c", "1.c", "2.c", "0.js", "1.js", "0.py"]


def test_the_walk_sees_a_folder_once_and_passes_over_links_and_missing_folders(tmp_path: Path) -> None:
    write_files(tmp_path / "real" / "inner", "c", 1)
    (tmp_path / "real" / "link.c").symlink_to(tmp_path / "real" / "inner" / "0.c")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    assert walked(tmp_path / "real", tmp_path / "real" / "inner", tmp_path / "absent") == ["0.c"]


def test_the_walk_stops_at_its_number_of_entries_and_at_its_time(tmp_path: Path) -> None:
    write_files(tmp_path, "c", 9)
    assert walked(tmp_path, max_entries=4) == ["0.c", "1.c", "2.c", "3.c"]
    assert walked(tmp_path, max_seconds=0.0) == []


def test_paths_are_grouped_by_what_their_extension_means() -> None:
    files = [("/x/b.py", "b.py"), ("/x/.py", ".py"), ("/x/c", "c"), ("/x/a.pyi", "a.pyi"), ("/x/y.c", "y.c")]
    assert paths_by_class(files, {"c": 0, "py": 1, "pyi": 1}) == {0: ["/x/y.c"], 1: ["/x/a.pyi", "/x/b.py"]}


# ------------------------------------------------------------------------------------------------------------ fragments


def test_a_fragment_is_512_bytes_of_a_file_of_its_label(tmp_path: Path) -> None:
    found = gather([(3, write_files(tmp_path, "c", 6)), (5, write_files(tmp_path, "py", 6))], seed=0)
    for row, label, (extension, number) in zip(found.inputs, found.labels, sources_of(found), strict=True):
        assert {"c": 3, "py": 5}[extension] == label
        content = content_of(row)
        assert 510 <= len(content) <= 512  # a line's end may have been stripped
        assert content in marked(extension, number)


def test_a_file_gives_at_most_8_fragments_which_do_not_overlap(tmp_path: Path) -> None:
    found = gather([(0, write_files(tmp_path, "c", 5, size=9 * 512 + 100))], seed=0)
    lines = [match.group() for row in found.inputs for match in MARK.finditer(content_of(row))]
    assert len(found.labels) == 5 * 8
    assert len(set(lines)) == len(lines)


def test_fragments_start_anywhere_and_not_at_multiples_of_their_length(tmp_path: Path) -> None:
    found = gather([(0, write_files(tmp_path, "c", 20, size=1000))], seed=0)
    contents = map(content_of, found.inputs)
    starts = {marked("c", n).index(part) for part, (_, n) in zip(contents, sources_of(found), strict=True)}
    assert len(found.labels) == 20
    assert len(starts) > 10


def test_no_file_gives_to_both_halves_and_each_class_is_halved(tmp_path: Path) -> None:
    found = gather([(0, write_files(tmp_path, "c", 9)), (1, write_files(tmp_path, "py", 20))], seed=0)
    sources = sources_of(found)
    test = {source for source, is_test in zip(sources, found.is_test, strict=True) if is_test}
    calibration = {source for source, is_test in zip(sources, found.is_test, strict=True) if not is_test}
    assert max(Counter(sources).values()) > 1  # else there would be nothing to hold
    assert not test & calibration
    assert Counter(extension for extension, _ in test) == {"c": 4, "py": 10}
    assert Counter(extension for extension, _ in calibration) == {"c": 5, "py": 10}


def test_the_same_files_and_seed_give_the_same_fragments_and_another_seed_gives_others(tmp_path: Path) -> None:
    classes = [(0, write_files(tmp_path, "c", 9)), (1, write_files(tmp_path, "py", 9))]
    first, again, other = gather(classes, seed=7), gather(classes, seed=7), gather(classes, seed=8)
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.is_test, again.is_test)
    assert set(map(content_of, first.inputs)) != set(map(content_of, other.inputs))


def test_rows_are_in_random_order_so_that_a_stream_of_them_mixes_classes(tmp_path: Path) -> None:
    """A random order of 50 rows in two equal classes has fewer than 6 changes with probability below 1e-8."""
    classes = [(0, write_files(tmp_path, "c", 25, size=600)), (1, write_files(tmp_path, "py", 25, size=600))]
    labels = gather(classes, seed=0).labels
    assert len(labels) == 50
    assert np.count_nonzero(np.diff(labels)) >= 6


def test_copies_of_a_file_and_files_too_small_too_large_or_unreadable_do_not_count(tmp_path: Path) -> None:
    paths = write_files(tmp_path, "c", 5)
    large = marked("c", 5, fragments.LARGEST_FILE_BYTES)
    unwanted = {
        "copy.c": marked("c", 0),
        "empty.c": b"",
        "small.c": marked("c", 6, 511),
        "large.c": large + b"!",
    }
    for name, content in unwanted.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.c").mkdir()
    extra = [str(tmp_path / name) for name in (*unwanted, "folder.c", "absent.c")]
    assert {number for _, number in sources_of(gather([(0, paths + extra)], seed=0))} == {0, 1, 2, 3, 4}

    (tmp_path / "largest.c").write_bytes(large)
    write_files(tmp_path / "exact", "c", 8, size=512)
    limits = [str(tmp_path / "largest.c"), *(str(tmp_path / "exact" / f"{i}.c") for i in (6, 7))]
    assert {number for _, number in sources_of(gather([(0, paths + limits)], seed=0))} == {0, 1, 2, 3, 4, 5, 6, 7}


def test_copies_do_not_make_up_the_files_that_a_class_needs(tmp_path: Path) -> None:
    paths = [*write_files(tmp_path / "here", "c", 3), *write_files(tmp_path / "there", "c", 3)]
    assert len(gather([(0, paths)], seed=0).labels) == 0


def test_a_fragment_found_in_two_classes_is_taken_for_the_first(tmp_path: Path) -> None:
    both = [write_files(tmp_path, extension, 5, size=512) for extension in ("c", "py")]
    for number, paths in enumerate(both):
        padded = tmp_path / f"padded{number}"
        padded.write_bytes(bytes(600 + number))
        paths.append(str(padded))
    found = gather(enumerate(both), seed=0)
    zeros = [content_of(row) == bytes(512) for row in found.inputs]
    assert len(found.labels) == 11
    assert found.labels[zeros].tolist() == [0]


def test_no_two_fragments_are_alike_and_none_is_white_space(tmp_path: Path) -> None:
    paths = write_files(tmp_path, "c", 5, size=512)
    for number in range(3):
        (tmp_path / f"zeros{number}.c").write_bytes(bytes(600 + number))
        (tmp_path / f"blank{number}.c").write_bytes(b" " * (600 + number) + b"seven b"[number:])
    paths += [str(path) for path in sorted(tmp_path.glob("*[a-z][0-9].c"))]
    contents = Counter(content_of(row) for row in gather([(0, paths)], seed=0).inputs)
    assert contents.total() == len(contents) == 6
    assert contents[bytes(512)] == 1


def test_a_class_with_fewer_than_4_files_takes_no_part(tmp_path: Path) -> None:
    found = gather([(0, write_files(tmp_path, "c", 3)), (1, write_files(tmp_path, "py", 4))], seed=0)
    assert set(found.labels.tolist()) == {1}


def test_a_class_gives_at_most_its_cap_and_second_fragments_only_after_all_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragments, "MOST_OF_A_CLASS", 10)
    many, few = write_files(tmp_path, "c", 30), write_files(tmp_path, "py", 7)
    found = gather([(0, many), (1, few)], seed=0)
    by_file = Counter(sources_of(found))
    assert sorted(n for (extension, _), n in by_file.items() if extension == "c") == [1] * 10
    assert {n for extension, n in by_file if extension == "c"} != set(range(10))  # chosen by the seed, not the first
    assert sorted(n for (extension, _), n in by_file.items() if extension == "py") == [1] * 4 + [2] * 3


def test_all_classes_together_give_at_most_their_cap_shared_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragments, "MOST_FRAGMENTS", 25)
    sizes = {"c": 5, "py": 30, "js": 40}
    classes = [(i, write_files(tmp_path, extension, n, size=600)) for i, (extension, n) in enumerate(sizes.items())]
    assert Counter(gather(classes, seed=0).labels.tolist()) == {0: 5, 1: 10, 2: 10}


# ------------------------------------------------------------------------------------------------------- the whole step


def wheel_bytes(model: bytes = b"a model", *, without: str = "") -> bytes:
    members = {
        step1_prepare.MODEL_FILE: model,
        step1_prepare.CONFIG_FILE: json.dumps({"target_labels_space": CLASS_NAMES}).encode(),
        step1_prepare.KNOWLEDGE_FILE: json.dumps(KNOWLEDGE_BASE).encode(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            if name != without:
                archive.writestr(name, content)
    return buffer.getvalue()


class Pip:
    """Stands in for `subprocess.run`: leaves a wheel in the folder asked for, or fails."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.fails = False

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.fails:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to the index\n")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "magika-1.0.3-py3-none-any.whl").write_bytes(wheel_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    stand_in = Pip()
    monkeypatch.setattr(step1_prepare.subprocess, "run", stand_in)
    monkeypatch.setattr(step1_prepare, "MODEL_SHA256", hashlib.sha256(b"a model").hexdigest())
    return stand_in


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    write_files(folder, "c", 6)
    write_files(folder / "inner", "py", 8)
    write_files(folder, "txt", 6)
    return folder


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_step_writes_a_model_repository_and_labelled_fragments(tmp_path: Path, root: Path, pip: Pip) -> None:
    out = tmp_path / "new" / "demo"
    prepared = prepare(out, roots=[root], console=QUIET)
    files = files_under(out)
    assert sorted(files) == [
        "fragments.npz",
        WHEEL_NAME,
        "models/magika/1/model.onnx",
        "models/magika/calserve.toml",
        "models/magika/labels.txt",
    ]
    assert files["models/magika/1/model.onnx"] == b"a model"
    assert ModelFolder.read(out / "models" / "magika").class_names == tuple(CLASS_NAMES)  # as the server reads it

    assert prepared.model_repository == out / "models"
    assert prepared.model_path == out / "models" / "magika" / "1" / "model.onnx"
    assert prepared.class_names.tolist() == CLASS_NAMES
    assert set(prepared.labels.tolist()) == {0, 1}
    assert (prepared.inputs.dtype, prepared.inputs.shape) == (np.int32, (len(prepared.labels), 2048))
    assert (prepared.labels.dtype, prepared.is_test.dtype) == (np.int64, np.bool_)
    assert str(root).encode() not in files["fragments.npz"]
    with np.load(out / "fragments.npz") as archive:
        assert set(archive) == {"inputs", "labels", "class_names", "is_test"}


def test_another_run_needs_no_network_and_writes_the_same_bytes(tmp_path: Path, root: Path, pip: Pip) -> None:
    prepare(tmp_path / "demo", roots=[root], console=QUIET)
    before = files_under(tmp_path / "demo")
    prepare(tmp_path / "demo", roots=[root], console=QUIET)
    assert len(pip.commands) == 1
    assert files_under(tmp_path / "demo") == before


def test_what_was_prepared_is_what_is_loaded_later(tmp_path: Path, root: Path, pip: Pip) -> None:
    prepared, loaded = prepare(tmp_path / "demo", roots=[root], console=QUIET), load(tmp_path / "demo")
    assert loaded.model_repository == prepared.model_repository
    np.testing.assert_array_equal(loaded.inputs, prepared.inputs)
    np.testing.assert_array_equal(loaded.is_test, prepared.is_test)


def test_loading_before_preparing_says_which_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run `python -m examples\.step1_prepare --out .*absent` first"):
        load(tmp_path / "absent")


def test_the_wheel_is_downloaded_and_never_installed(tmp_path: Path, root: Path, pip: Pip) -> None:
    prepare(tmp_path / "demo", roots=[root], console=QUIET)
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", REQUIREMENT} <= set(command)


def test_a_failed_download_leaves_nothing_and_says_what_pip_said_and_what_else_would_do(
    tmp_path: Path, root: Path, pip: Pip
) -> None:
    pip.fails = True
    with pytest.raises(RuntimeError, match=rf"(?s)put at .*{WHEEL_NAME} would do.*no route to the index"):
        prepare(tmp_path / "demo", roots=[root], console=QUIET)
    assert list((tmp_path / "demo").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (wheel_bytes(b"another model"), "should have sha256"),
        (wheel_bytes(without=step1_prepare.CONFIG_FILE), "is not a wheel of magika==1.0.3"),
        (b"<html>not found</html>", "is not a wheel of magika==1.0.3"),
    ],
    ids=["another model", "a table missing", "no wheel at all"],
)
def test_a_wheel_that_is_not_the_one_expected_is_refused_before_anything_is_written(
    tmp_path: Path, root: Path, pip: Pip, content: bytes, complaint: str
) -> None:
    (tmp_path / WHEEL_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        prepare(tmp_path, roots=[root], console=QUIET)
    assert not (tmp_path / "models").exists()


def test_files_of_one_format_are_too_few_to_fit_on(tmp_path: Path, root: Path, pip: Pip) -> None:
    with pytest.raises(ValueError, match="at least 2 formats are needed to fit on, got 1"):
        prepare(tmp_path / "demo", roots=[root / "inner"], console=QUIET)
    assert not (tmp_path / "demo" / "fragments.npz").exists()
