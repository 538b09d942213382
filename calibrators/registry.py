"""Kinds by name: the files of `calibrators/kinds`, found by their filenames and imported when asked for."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from calibrators.base import Calibrator

# Imported here, before `calibrators` binds the function `kinds`, which then keeps the name.
_PACKAGE = importlib.import_module("calibrators.kinds")


def kinds() -> list[str]:
    """Names of all kinds, sorted.

    >>> "temperature" in kinds()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(_PACKAGE.__path__) if not module.name.startswith("_"))


def create(kind: str, /, **params: Any) -> Calibrator:
    """An unfitted calibrator.

    Parameters
    ----------
    kind : one of `kinds()`
    params : constructor parameters of that kind, plain JSON values

    Raises
    ------
    ValueError
        for an unknown kind or parameter, naming the known ones, and for a value outside its parameter's range

    Examples
    --------
    >>> create("isotonic", method="accuracy_preserving")
    IsotonicCalibration(method='accuracy_preserving')
    """
    cls = _class_of(kind)
    known = cls().get_params(deep=False)
    if unknown := sorted(params.keys() - known):
        raise ValueError(f"{kind} has parameters {sorted(known)}, got {unknown}")
    calibrator = cls(**params)
    calibrator.check_params()
    return calibrator


def _class_of(kind: str) -> type[Calibrator]:
    """The one public subclass of Calibrator which the kind's file defines."""
    if kind not in kinds():
        raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(kinds())}")
    module = importlib.import_module(f"{_PACKAGE.__name__}.{kind}")
    defined = [
        member
        for name, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Calibrator) and member.__module__ == module.__name__ and not name.startswith("_")
    ]
    if len(defined) != 1:
        raise TypeError(f"{module.__name__} must define one public Calibrator, it defines {len(defined)}")
    return defined[0]
