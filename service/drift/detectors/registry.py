"""Kinds by name: the files of this folder that define a detector, found by their filenames."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

from service.drift import detectors
from service.drift.detectors.base import Detector


def kinds() -> list[str]:
    """Names of all kinds, sorted.

    >>> "recalibration" in kinds()
    True
    """
    return sorted(_classes())


def create(kind: str, /, **parameters: float | str) -> Detector:
    """A detector that has read nothing.

    Parameters
    ----------
    kind : one of `kinds()`
    parameters : keywords of that kind's constructor

    Raises
    ------
    ValueError
        for an unknown kind or parameter, naming the known ones, and for a value outside its parameter's range
    """
    cls = _classes().get(kind)
    if cls is None:
        raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(kinds())}")
    known = parameters_of(kind)
    if unknown := sorted(parameters.keys() - known):
        raise ValueError(f"{kind} has parameters {sorted(known)}, got {unknown}")
    detector: Detector = cls(**parameters)
    return detector


def parameters_of(kind: str) -> dict[str, float | str]:
    """The keywords of a kind's constructor and their defaults."""
    signature = inspect.signature(_classes()[kind])
    return {name: parameter.default for name, parameter in signature.parameters.items()}


@cache
def _classes() -> dict[str, Any]:
    """Kind -> the one public detector that its file defines; files without one hold what detectors share."""
    found: dict[str, type[Detector]] = {}
    for file in pkgutil.iter_modules(detectors.__path__):
        module = importlib.import_module(f"{detectors.__name__}.{file.name}")
        defined = [
            member
            for name, member in inspect.getmembers(module, inspect.isclass)
            if issubclass(member, Detector) and member.__module__ == module.__name__ and not inspect.isabstract(member)
            if not name.startswith("_")
        ]
        if defined and [cls.kind for cls in defined] != [file.name]:
            raise TypeError(f"{module.__name__} must define one public detector, of kind {file.name!r}")
        found.update((cls.kind, cls) for cls in defined)
    return found
