"""Labelled fragments of this machine's own files, as the file-type classifier magika reads them.

A file's label is its extension, in the model's class names. A fragment is 512 bytes from anywhere in a file: what a
scanner of streams, packets or disk sectors sees. The model was trained on whole files, so this is a shift of inputs
like those that deployment brings.

Everything here is deterministic: the same files and the same seed give the same fragments, unless the walk runs out of
time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAGMENT_BYTES = 512
LARGEST_FILE_BYTES = 1 << 20  # files are read whole, to know duplicates by
FEWEST_FILES = 4  # of a class, so that each half has two
MOST_FRAGMENTS = 5000
MOST_OF_A_CLASS = 200  # however few the other classes give; every one is read
MOST_OF_A_FILE = 8  # in classes with few files; where there are enough, a file gives one

# The model's input, as magika's config.min.json has it.
BLOCK_BYTES = 4096
END_TOKENS = 1024  # the first tokens and the last, this many of each
PADDING_TOKEN = 256
FEWEST_TOKENS = 8  # magika answers shorter contents by a rule, without its model

SAME_FORMAT = {
    "so": "elf",
    "o": "elf",  # on Linux; COFF elsewhere
    "crt": "pem",  # Linux keeps certificates as PEM text; the model's class crt is the binary form
    "pm": "perl",
    "hh": "cpp",
    "hpp": "cpp",
    "hxx": "cpp",
    "tcc": "cpp",
    "mk": "makefile",
    "r": "r",
    "pom": "xml",
    "xsd": "xml",
    "xsl": "xml",
    "desktop": "ini",
    "service": "ini",
}
"""Extensions that magika's table lacks, or gives to a class that is not what Linux systems store under them."""

LEFT_OUT = {
    "cat": "Windows catalogue or message catalogue",
    "cl": "Lisp or OpenCL",
    "doc": "Word or plain text",
    "gpg": "armoured text or binary keys",
    "hlp": "Windows help or plain text",
    "jsonld": "one JSON document, where the class jsonl is one a line",
    "l": "Lisp or lex",
    "obj": "COFF or Wavefront",
    "pp": "Pascal or Puppet",
    "pro": "Prolog or a Qt project",
    "P": "Prolog or Pascal",
    "pt": "PyTorch, or a text in Portuguese",
    "pth": "PyTorch, or a list of Python folders",
    "pub": "a public key in one of many forms, or Publisher",
    "snap": "a Linux package or a test's recorded text",
    "srt": "subtitles, or a text in Serbian",
    "ts": "TypeScript, MPEG video or a Qt translation",
    "txt": "text of any format",
    "v": "Verilog or Coq",
}
"""Extensions that one class of the model claims and that name other formats too. (No class of it claims C's `h`.)"""


@dataclass(frozen=True)
class Fragments:
    """Labelled model inputs in two halves that share no file."""

    inputs: NDArray[np.int32]  # (n_samples, 2048)
    labels: NDArray[np.int64]  # (n_samples,) class indices
    is_test: NDArray[np.bool_]  # (n_samples,) the test half; the others are the calibration set


def extension_classes(knowledge_base: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]) -> dict[str, int]:
    """The class index that each extension means.

    From the extensions in magika's `content_types_kb.min.json`, those that exactly one of the model's classes claims;
    then `SAME_FORMAT` added and `LEFT_OUT` taken away.
    """
    index = {name: i for i, name in enumerate(class_names)}
    claims = defaultdict(list)
    for name in class_names:
        for extension in knowledge_base[name]["extensions"]:
            claims[extension].append(name)
    meaning = {extension: names[0] for extension, names in claims.items() if len(names) == 1} | SAME_FORMAT
    return {
        extension: index[name] for extension, name in meaning.items() if name in index and extension not in LEFT_OUT
    }


def walk(roots: Iterable[Path], *, max_entries: int, max_seconds: float) -> Iterator[tuple[str, str]]:
    """(path, name) of regular files under `roots`, in a fixed order; symbolic links are not followed.

    The upper levels of all roots come first, so that a walk cut short at its bound has still seen something of each.
    """
    deadline = time.monotonic() + max_seconds
    folders = deque(str(root.resolve()) for root in roots)
    visited = set()
    entries = 0
    while folders and time.monotonic() < deadline:
        folder = folders.popleft()
        if folder in visited:  # one root may lie in another
            continue
        visited.add(folder)
        for entry in _sorted_entries(folder):
            entries += 1
            if entries > max_entries:
                return
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry.path, entry.name


def _sorted_entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:  # gone, or not ours to read
        return []


def paths_by_class(files: Iterable[tuple[str, str]], extensions: Mapping[str, int]) -> dict[int, list[str]]:
    """Sorted paths of the files whose extension means a class, by class index."""
    found = defaultdict(list)
    for path, name in files:
        stem, _, extension = name.rpartition(".")
        if stem and extension in extensions:
            found[extensions[extension]].append(path)
    return {label: sorted(found[label]) for label in sorted(found)}


def gather(classes: Iterable[tuple[int, list[str]]], *, seed: int) -> Fragments:
    """Fragments of the files of each class: no two alike, in random order, split by file.

    At most 5,000, shared as evenly as the classes allow; at most 200 of a class, which must have 4 files or more.
    Copies of a file count once; files under 512 bytes, over 1 MiB or unreadable do not count.

    Parameters
    ----------
    classes : (class index, paths) for each class, as `paths_by_class` finds them
    """
    contents_seen: set[bytes] = set()
    taken: set[bytes] = set()
    cuts: dict[int, dict[bytes, int]] = {}  # class index -> fragment -> number of its file within the class
    for label, paths in classes:
        found = _cut_class(paths, np.random.default_rng([seed, label]), contents_seen)
        distinct = {fragment: file for fragment, file in found if fragment not in taken}
        if len(set(distinct.values())) >= FEWEST_FILES:
            cuts[label] = distinct
            taken.update(distinct)
    share = _even_share([len(distinct) for distinct in cuts.values()])
    rows = [(fragment, label, file) for label in cuts for fragment, file in islice(cuts[label].items(), share)]
    rng = np.random.default_rng(seed)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    labels = np.array([label for _, label, _ in rows], dtype=np.int64)
    files = np.array([file for _, _, file in rows], dtype=np.int64)
    return Fragments(model_inputs([fragment for fragment, _, _ in rows]), labels, _halve(labels, files, rng))


def _cut_class(paths: Sequence[str], rng: np.random.Generator, contents_seen: set[bytes]) -> list[tuple[bytes, int]]:
    """(fragment, number of its file): the first of every file, then the second of every file that has one, and on."""
    shuffled = [paths[i] for i in rng.permutation(len(paths))]
    turns = [
        (turn, fragment, file)
        for file, content in enumerate(islice(_distinct_contents(shuffled, contents_seen), MOST_OF_A_CLASS))
        for turn, fragment in enumerate(cut(content, MOST_OF_A_FILE, rng))
    ]
    return [(fragment, file) for _, fragment, file in sorted(turns, key=lambda row: row[0])]


def _even_share(counts: Sequence[int]) -> int:
    """The largest number that each class may give so that all together give at most `MOST_FRAGMENTS`."""
    return max(share for share in range(1, MOST_OF_A_CLASS + 1) if sum(min(n, share) for n in counts) <= MOST_FRAGMENTS)


def _distinct_contents(paths: Iterable[str], seen: set[bytes]) -> Iterator[bytes]:
    """Contents of the files that count; their digests are added to `seen`."""
    for path in map(Path, paths):
        try:
            content = path.read_bytes() if FRAGMENT_BYTES <= path.stat().st_size <= LARGEST_FILE_BYTES else b""
        except OSError:
            continue
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen:
            seen.add(digest)
            yield content


def cut(content: bytes, count: int, rng: np.random.Generator) -> list[bytes]:
    """Up to `count` fragments of 512 bytes from random places, which do not overlap; near-empty ones are dropped."""
    places, spare = divmod(len(content), FRAGMENT_BYTES)
    shift = rng.integers(spare + 1)
    starts = shift + FRAGMENT_BYTES * rng.choice(places, size=min(count, places), replace=False)
    fragments = [content[start : start + FRAGMENT_BYTES] for start in starts]
    return [fragment for fragment in fragments if len(fragment.lstrip()) >= FEWEST_TOKENS]


def model_inputs(contents: Sequence[bytes]) -> NDArray[np.int32]:
    """The model's input for each content, int32 (n_samples, 2048): bytes as numbers, 256 where there are none.

    As `Magika._extract_features_from_seekable` of magika 1.0.3: the first 1024 bytes left of the first 4096 once white
    space before them is stripped, padded right; then the last 1024 left of the last 4096 once white space after them is
    stripped, padded left.
    """
    inputs = np.full((len(contents), 2 * END_TOKENS), PADDING_TOKEN, dtype=np.int32)
    for row, content in zip(inputs, contents, strict=True):
        first = content[:BLOCK_BYTES].lstrip()[:END_TOKENS]
        last = content[-BLOCK_BYTES:].rstrip()[-END_TOKENS:]
        row[: len(first)] = np.frombuffer(first, np.uint8)
        row[len(row) - len(last) :] = np.frombuffer(last, np.uint8)
    return inputs


def _halve(labels: NDArray[np.int64], files: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """True for the fragments of a random half of each class's files."""
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        present = rng.permutation(np.unique(files[rows]))
        is_test[rows] = np.isin(files[rows], present[: len(present) // 2])
    return is_test
