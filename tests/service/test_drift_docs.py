"""The examples in the docstrings of `service.drift` run and say what they print."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import service.drift

MODULES = [module.name for module in pkgutil.walk_packages(service.drift.__path__, "service.drift.")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
