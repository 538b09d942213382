"""Models without a network: the logits come with the request, made elsewhere.

Their calibrators, labels and monitors are those of any other model, because they are one: a graph that hands its input
on, in a folder of the model repository.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import onnx.parser

from service.errors import AlreadyExists, InvalidRequest, Refused, shown
from service.inference.repository import MODEL_NAME
from service.store.files import sync_folder, write_whole

LABELS = "labels.txt"

OF_LOGITS = """
    <ir_version: 8, opset_import: ["": 17]>
    passthrough (float[rows, CLASSES] logits) => (float[rows, CLASSES] unchanged) {
        unchanged = Identity (logits)
    }"""

# log p are logits: softmax(log p) = p / sum(p). That of p = 0 would make the logits of the linear kinds NaN; it counts
# as that of the smallest normal number, 1.2e-38. `zero` is zero, but NaN where a row's greatest number is not finite:
# such a row is no distribution, and is refused.
OF_LOG_PROBABILITIES = """
    <ir_version: 8, opset_import: ["": 17]>
    passthrough (float[rows, CLASSES] log_probabilities) => (float[rows, CLASSES] unchanged)
    <float smallest = {-87.336544}> {
        unchanged = Identity (log_probabilities)
        raised = Max (log_probabilities, smallest)
        most = ReduceMax <axes = [-1], keepdims = 1> (log_probabilities)
        zero = Sub (most, most)
        logits = Add (raised, zero)
    }"""

MAX_CLASSES = 1 << 20


def write(root: Path, name: str, n_classes: int, *, log_probabilities: bool = False, labels: bytes = b"") -> str:
    """Put a passthrough model in the repository, whole or not at all; return the name of its input.

    Parameters
    ----------
    labels : one class name a line; empty for none

    Raises
    ------
    InvalidRequest, AlreadyExists, Refused
        a name, a number of classes or labels that cannot be; a model of this name; a repository that is none
    """
    _check(root, name, n_classes, labels)
    folder = root / name
    if folder.exists():
        raise AlreadyExists(f"the repository has a model {name!r} already")
    model = graph(n_classes, log_probabilities=log_probabilities)
    temporary = root / f".{name}.{os.getpid()}.tmp"  # a name that is no model's
    try:
        (temporary / "1").mkdir(parents=True)
        write_whole(temporary / "1" / "model.onnx", model.SerializeToString())
        write_whole(temporary / "calserve.toml", _toml(with_labels=bool(labels)).encode())
        if labels:
            write_whole(temporary / LABELS, labels)
        temporary.rename(folder)
    except OSError as error:
        if folder.exists():  # another came first
            raise AlreadyExists(f"the repository has a model {name!r} already") from error
        raise Refused(f"model {name!r} cannot be written: {os.strerror(error.errno or 0)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(root)
    return model.graph.input[0].name


def graph(n_classes: int, *, log_probabilities: bool) -> onnx.ModelProto:
    """The input, FP32 [any, n_classes], as the output `unchanged`; and the tensor `logits` to tap."""
    text = OF_LOG_PROBABILITIES if log_probabilities else OF_LOGITS
    return onnx.parser.parse_model(text.replace("CLASSES", str(n_classes)))


def _check(root: Path, name: str, n_classes: int, labels: bytes) -> None:
    if not root.is_dir():
        raise Refused(f"the model repository {shown(str(root))} is not a directory")
    if not MODEL_NAME.fullmatch(name):
        raise InvalidRequest(
            f"a model's name has up to 128 letters, digits and '_', '.', '+', '-', the first a letter or a digit; "
            f"got {shown(name)}"
        )
    if not 2 <= n_classes <= MAX_CLASSES:
        raise InvalidRequest(f"a model has 2 to {MAX_CLASSES} classes, got {n_classes}")
    try:
        count = len(labels.decode().removesuffix("\n").split("\n"))
    except UnicodeDecodeError:
        raise InvalidRequest("the labels are not UTF-8 text") from None
    if labels and count != n_classes:
        raise InvalidRequest(f"the labels are {count} lines, {n_classes} wanted, one a class")


def _toml(*, with_labels: bool) -> str:
    return 'logits = "logits"\n' + (f'labels = "{LABELS}"\n' if with_labels else "")
