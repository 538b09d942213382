"""artifact: one fit, one name; and bytes from strangers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import calibrators
from calibrators.artifact import MAX_HEADER_BYTES

Array = NDArray[Any]

N_CLASSES = 3


def artifact(kind: str = "temperature", **params: Any) -> bytes:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, N_CLASSES))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    return calibrators.dumps(calibrators.create(kind, **params).fit(2 * z, y))


VALID = {
    "identity": artifact("identity"),
    "temperature": artifact("temperature"),
    "platt": artifact("platt"),
    "isotonic": artifact("isotonic"),
    "isotonic, one map": artifact("isotonic", method="accuracy_preserving"),
}
DOCUMENT: dict[str, Any] = {"format": 1, "kind": "temperature", "params": {}}
TENSORS: dict[str, Array] = {"temperature": np.array(2.0), "n_classes": np.array(3)}


def written(document: Any = None, tensors: dict[str, Array] | None = None) -> bytes:
    """An artifact as a stranger may write it: well-formed safetensors of any content."""
    text = document if isinstance(document, str) else json.dumps(DOCUMENT if document is None else document)
    return bytes(safetensors.numpy.save(TENSORS if tensors is None else tensors, metadata={"calserve": text}))


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


# ---- names


def test_the_bytes_of_a_fit_are_its_name_for_ever() -> None:
    """Golden: recorded with safetensors 0.8.0. A change of these bytes renames every stored artifact."""
    calibrator = calibrators.create("temperature").set_tensors(TENSORS)
    data = calibrators.dumps(calibrator)
    assert data == written('{"format":1,"kind":"temperature","params":{}}')
    assert hashlib.sha256(data).hexdigest() == "e38ab9cf4c28510acbe4ae9287e041f747a4e334da4cc81c61786b90e063f9c2"


def test_the_name_is_the_same_in_another_process() -> None:
    """Hash randomisation orders sets and Rust's maps differently in each; neither may show in the bytes."""
    program = (
        "import sys, calibrators;"
        "fit = calibrators.create('isotonic').fit([[0, 1], [1, 0], [0, 3]] * 5, [1, 0, 0] * 5);"
        "sys.stdout.write(__import__('hashlib').sha256(calibrators.dumps(fit)).hexdigest())"
    )
    names = {
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60).stdout
        for _ in range(2)
    }
    assert len(names) == 1
    assert len(names.pop()) == 64


def test_the_metadata_is_one_key_of_canonical_json() -> None:
    data = artifact("isotonic", method="accuracy_preserving")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {
        "calserve": '{"format":1,"kind":"isotonic","params":{"method":"accuracy_preserving"}}'
    }


def test_a_loaded_calibrator_owns_its_arrays() -> None:
    loaded = calibrators.loads(VALID["platt"])
    for array in loaded.tensors().values():
        assert array.flags.writeable
    given = {name: array.copy() for name, array in loaded.tensors().items()}
    loaded.set_tensors(given)
    given["slope"][:] = 0
    assert loaded.tensors()["slope"].min() > 0


# ---- strangers


@pytest.mark.parametrize("data", VALID.values(), ids=VALID.keys())
def test_an_artifact_cut_short_anywhere_is_refused(data: bytes) -> None:
    for length in {*range(0, len(data), 7), len(data) - 1}:
        with pytest.raises(ValueError, match=r"artifact|JSON"):
            calibrators.loads(data[:length])
    with pytest.raises(ValueError, match="artifact"):
        calibrators.loads(data + b"\0")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**DOCUMENT, "format": 2}, "format 2, this release reads 1"),
        ({**DOCUMENT, "format": True}, "format True"),
        ({**DOCUMENT, "format": 1.0}, "format 1.0"),
        ({**DOCUMENT, "format": None}, "format None"),
        ({**DOCUMENT, "kind": "os"}, "unknown kind 'os'"),
        ({**DOCUMENT, "kind": "../temperature"}, "unknown kind"),
        ({**DOCUMENT, "kind": "__init__"}, "unknown kind"),
        ({**DOCUMENT, "kind": ["temperature"]}, "format, kind and params"),
        ({**DOCUMENT, "params": {"kind": 1}}, r"got \['kind'\]"),
        ({**DOCUMENT, "params": {"self": 1}}, r"got \['self'\]"),
        ({**DOCUMENT, "params": []}, "format, kind and params"),
        ({**DOCUMENT, "more": 1}, "format, kind and params"),
        ({"format": 1, "kind": "temperature"}, "format, kind and params"),
        ({"format": 1, "kind": "isotonic", "params": {"method": ["one_vs_rest"]}}, "method must be one of"),
        ([], "must be a JSON object, got list"),
        ("{", "not JSON"),
        ('{"format":1,"format":1,"kind":"temperature","params":{}}', "given twice"),
        ('{"format":NaN,"kind":"temperature","params":{}}', "NaN is not JSON"),
        ("[" * 60_000, "not JSON"),
    ],
)
def test_metadata_that_dumps_would_not_write_is_refused(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrators.loads(written(document))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"has tensors \['n_classes', 'temperature'\], got \[\]"),
        ({**TENSORS, "more": np.array(1.0)}, "got .*'more'"),
        ({"temperature": np.array(2.0)}, "got"),
        ({**TENSORS, "temperature": np.array(0.0)}, "temperature must lie in"),
        ({**TENSORS, "temperature": np.array(-2.0)}, "temperature must lie in"),
        ({**TENSORS, "temperature": np.array(1e300)}, "temperature must lie in"),
        ({**TENSORS, "temperature": np.array(np.nan)}, "not finite"),
        ({**TENSORS, "temperature": np.array(np.inf)}, "not finite"),
        ({**TENSORS, "temperature": np.array([2.0])}, r"float64 of shape \(\), got float64 of shape \(1,\)"),
        ({**TENSORS, "temperature": np.array(2.0, dtype=np.float32)}, "must be float64 .*, got float32"),
        ({**TENSORS, "temperature": np.array(2)}, "must be float64 .*, got int64"),
        ({**TENSORS, "temperature": np.array(2, dtype=np.int16)}, "a dtype of F64, F32, F16, I64"),
        ({**TENSORS, "temperature": np.zeros((0,))}, r"cannot have shape \[0\]"),
        ({**TENSORS, "n_classes": np.array(1)}, "n_classes must be 2 or more, got 1"),
        ({**TENSORS, "n_classes": np.array(3.0)}, "must be int64"),
        ({**TENSORS, "n_classes": np.array([3])}, r"shape \(\), got int64 of shape \(1,\)"),
    ],
)
def test_tensors_that_no_fit_could_have_learned_are_refused(tensors: dict[str, Array], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrators.loads(written(tensors=tensors))


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("platt", "slope", lambda array: array - 10, "slopes must lie in"),
        ("platt", "slope", lambda array: array[:2], r"shape \(3,\), got float64 of shape \(2,\)"),
        ("platt", "intercept", lambda array: array * np.nan, "not finite"),
        ("isotonic", "levels", lambda array: -array, "must not decrease"),
        ("isotonic", "levels", lambda array: array + 100, "within ±60"),
        ("isotonic", "levels", lambda array: array[:1], r"shape \(3, 64\), got float32 of shape \(1, 64\)"),
        ("isotonic", "low", lambda array: -array, "grids must reach"),
        ("isotonic", "high", lambda array: array * np.float32(1e38), "not finite|grids must reach"),
        ("isotonic, one map", "levels", lambda array: np.repeat(array, 3, axis=0), r"shape \(1, 64\)"),
    ],
)
def test_each_kind_checks_its_own_arrays(kind: str, name: str, change: Any, message: str) -> None:
    calibrator = calibrators.loads(VALID[kind])
    before = calibrators.dumps(calibrator)
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=message):
        calibrator.set_tensors({**calibrator.tensors(), name: change(calibrator.tensors()[name])})
    assert calibrators.dumps(calibrator) == before


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 8,
        b"\xff" * 16,
        (2**63).to_bytes(8, "little") + b"{}",
        with_header(b"{}"),
        with_header(b"[]"),
        with_header(b"\xff\xfe"),
        with_header(b'{"__metadata__":{"calserve":1}}'),
        with_header(b'{"__metadata__":{"calserve":"{}","more":""}}'),
        with_header(b'{"__metadata__":"calserve"}'),
        with_header(b"[" * 10_000),
        b"\x80\x05\x95cos\nsystem\n",
        b"PK\x03\x04" + b"\x00" * 100,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_bytes_that_are_no_artifact_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"artifact|format"):
        calibrators.loads(data)


def test_a_header_longer_than_any_of_ours_is_refused_unread() -> None:
    data = VALID["temperature"]
    length = int.from_bytes(data[:8], "little")
    padded = with_header(data[8 : 8 + length].ljust(MAX_HEADER_BYTES + 8), data[8 + length :])
    assert safetensors.numpy.load(padded).keys() == {"temperature", "n_classes"}
    with pytest.raises(ValueError, match="cannot hold a header of 65544 bytes"):
        calibrators.loads(padded)


def test_a_second_key_of_metadata_is_refused() -> None:
    data = safetensors.numpy.save(TENSORS, metadata={"calserve": json.dumps(DOCUMENT), "more": "x"})
    with pytest.raises(ValueError, match="metadata must be one text"):
        calibrators.loads(data)


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"F64","shape":[4611686018427387904,4],"data_offsets":[0,8]}',
        '{"dtype":"F64","shape":[0,18446744073709551616],"data_offsets":[0,0]}',
        '{"dtype":"F64","shape":[-1],"data_offsets":[0,8]}',
        '{"dtype":"F64","shape":[true],"data_offsets":[0,8]}',
        '{"dtype":"F64","shape":{},"data_offsets":[0,8]}',
        '{"dtype":"F64","shape":[],"data_offsets":[0,800]}',
        '{"dtype":"F64","shape":[],"data_offsets":[8,0]}',
        '{"dtype":"F64","shape":[],"data_offsets":[0,1e400]}',
        '{"dtype":"F64","shape":[]}',
        '{"dtype":["F64"],"shape":[],"data_offsets":[0,8]}',
        '{"dtype":"F8_E8M0","shape":[],"data_offsets":[0,8]}',
        "[]",
        "null",
    ],
)
def test_a_tensor_that_does_not_fit_its_bytes_is_refused(entry: str) -> None:
    metadata = json.dumps({"calserve": json.dumps(DOCUMENT)})
    header = f'{{"__metadata__":{metadata},"temperature":{entry}}}'.encode()
    with pytest.raises(ValueError, match=r"tensor|artifact"):
        calibrators.loads(with_header(header, bytes(8)))


mutations = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "repeat"]), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)  # fmt: skip


def mutated(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for action, place, value in changes:
        at = int(place * len(data))
        after = {"set": len(value), "insert": 0, "delete": len(value), "repeat": -len(value)}[action]
        data = data[:at] + (b"" if action in ("delete", "repeat") else value) + data[max(0, at + after) :]
    return data


@pytest.mark.parametrize("name", VALID)
@settings(max_examples=400, deadline=None, derandomize=True)
@given(changes=mutations)
def test_mutated_bytes_are_refused_or_mean_exactly_what_they_say(
    name: str, changes: list[tuple[str, float, bytes]]
) -> None:
    """Numbers carry no check of their own (the sha256 by which artifacts are stored is theirs), so some changes load.
    Then every array is the one that stands in the bytes, and rows are distributions."""
    data = mutated(VALID[name], changes)
    try:
        loaded = calibrators.loads(data)
    except ValueError:
        return
    stated = safetensors.numpy.load(data)
    assert stated.keys() == loaded.tensors().keys()
    for tensor, array in loaded.tensors().items():
        np.testing.assert_array_equal(array, stated[tensor])
    if loaded.tensors()["n_classes"] == N_CLASSES:
        probabilities = loaded.predict_proba(np.array([[5.0, 0.0, -5.0], [1e4, 1e4, -1e4]]))
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-6)
        assert calibrators.dumps(calibrators.loads(calibrators.dumps(loaded))) == calibrators.dumps(loaded)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"artifact|JSON"):
        calibrators.loads(data)
