"""Transformed copies of images, by numpy and as ONNX: the same arithmetic twice, compared by a test.

A view of a row is what the model says of such a copy: its logits. Images are [B, C, H, W], real; copies keep the shape
and are stacked on the batch axis, one whole batch after the other.

- "grey": each pixel's mean over the channels, in all of them.
- "flip": left and right exchanged.
- "rotate": a quarter turn counter-clockwise, for images as high as wide.

All three know nothing of colour spaces, of ranges or of a mean that was taken off, and draw nothing at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from calibrators.graph import Graph
from calibrators.numerics import Array, to_numpy

OLDEST_OPSET = 11
"""Where Slice has steps and GatherElements exists."""


def views(model: Callable[[Array], ArrayLike], images: ArrayLike, transforms: Sequence[str]) -> Array:
    """The logits (n_samples, n_views, n_classes) of transformed copies, as `fit` and `predict_proba` take them.

    Parameters
    ----------
    model : from images (n, C, H, W) to logits (n, n_classes); called once for each transform
    images : (n_samples, C, H, W)
    transforms : names of `TRANSFORMS`, in the order of the calibrator's parameter

    Examples
    --------
    >>> image = np.arange(4.0).reshape(1, 1, 2, 2)
    >>> views(lambda copies: copies.reshape(-1, 4), image, ["flip", "rotate"]).tolist()
    [[[1.0, 0.0, 3.0, 2.0], [1.0, 3.0, 0.0, 2.0]]]
    """
    return np.stack([to_numpy(model(copy)) for copy in copies(images, transforms)], axis=1)


def copies(images: ArrayLike, transforms: Sequence[str]) -> Iterator[Array]:
    """The copies of the images (n_samples, C, H, W), each in their shape and type, made one after the other."""
    array = to_numpy(images)
    check_transforms(transforms)
    if array.ndim != 4 or ("rotate" in transforms and array.shape[2] != array.shape[3]):
        raise ValueError(f"images must have shape (n_samples, C, H, W), to rotate with H = W, got {array.shape}")
    return (TRANSFORMS[name][0](array) for name in transforms)


def emit_copies(graph: Graph, x: str, transforms: Sequence[str]) -> str:
    """The copies of the images [B, C, H, W] that the graph's input `x` holds, [V * B, C, H, W], in x's type."""
    if graph.opset < OLDEST_OPSET:
        raise ValueError(f"views need opset {OLDEST_OPSET} or later, the model uses {graph.opset}")
    _, (_, _, height, width) = graph.image_input()
    if "rotate" in transforms and height is not None and width is not None and height != width:
        raise ValueError(f"to rotate, images must be as high as wide, the model reads {height} x {width}")
    return graph.node("Concat", *(TRANSFORMS[name][1](graph, x) for name in transforms), axis=0)


def check_transforms(transforms: Sequence[str]) -> None:
    """Raise ValueError unless these are distinct names of `TRANSFORMS`, one or more."""
    known = isinstance(transforms, list | tuple) and all(name in [*TRANSFORMS] for name in transforms)
    if not known or not 0 < len(transforms) == len(set(transforms)):
        raise ValueError(f"views must be distinct names of {', '.join(TRANSFORMS)}, one or more, got {transforms!r}")


def _grey(images: Array) -> Array:
    return np.repeat(images.mean(axis=1, keepdims=True), images.shape[1], axis=1)


def _flip(images: Array) -> Array:
    return images[..., ::-1]


def _rotate(images: Array) -> Array:
    return np.rot90(images, axes=(2, 3))


def _emit_grey(graph: Graph, x: str) -> str:
    return graph.node("Expand", graph.reduce("ReduceMean", x, axis=1), graph.node("Shape", x))


def _emit_flip(graph: Graph, x: str) -> str:
    return _reversed(graph, x, axis=3)


def _emit_rotate(graph: Graph, x: str) -> str:
    return _reversed(graph, graph.node("Transpose", x, perm=[0, 1, 3, 2]), axis=2)


def _reversed(graph: Graph, x: str, *, axis: int) -> str:
    start, end, along, step = (
        graph.constant(np.array([value], dtype=np.int64)) for value in (-1, np.iinfo(np.int64).min, axis, -1)
    )
    return graph.node("Slice", x, start, end, along, step)


TRANSFORMS: dict[str, tuple[Callable[[Array], Array], Callable[[Graph, str], str]]] = {
    "grey": (_grey, _emit_grey),
    "flip": (_flip, _emit_flip),
    "rotate": (_rotate, _emit_rotate),
}
"""Each by its name: numpy, ONNX."""
