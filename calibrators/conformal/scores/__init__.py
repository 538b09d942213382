"""The nonconformity scores, a file each; the filename is the score's name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from calibrators.conformal.score import Score


def names() -> list[str]:
    """Names of all scores, sorted.

    >>> names()
    ['aps', 'lac', 'margin', 'raps', 'saps', 'top_k']
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def score_class(name: str) -> type[Score]:
    """The score which the file of this name defines; ValueError for an unknown name."""
    if name not in names():
        raise ValueError(f"score must be one of {', '.join(names())}, got {name!r}")
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Score) and member.__module__ == module.__name__
    )
    return found


def create_score(name: str, values: Mapping[str, float] | None = None) -> Score:
    """A score with the values of its parameters, all of them.

    Raises
    ------
    ValueError
        for an unknown score, for parameters that are not the score's, and for values outside their range

    Examples
    --------
    >>> create_score("raps", {"penalty": 0.01, "free_ranks": 5}).name
    'raps'
    """
    found, given = score_class(name), dict(values or {})
    if given.keys() != set(found.parameters):
        raise ValueError(f"score {name} has parameters {sorted(found.parameters)}, got {sorted(given)}")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in given.values()):
        raise ValueError(f"parameters of a score must be numbers, got {given}")
    found.check(given)
    return found(given)
