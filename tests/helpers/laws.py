"""How much is tried without `--long`: examples of a law, turns given to chance, parameters of a test."""

import itertools
from typing import Any

import pytest
from hypothesis import settings


def examples(n: int) -> settings:
    """Decorator: n examples, and five times as many in `make test-long`; 100 and 500 without it."""
    return settings(max_examples=n * settings().max_examples // 100)


def times(n: int) -> int:
    """How often to try what only chance can find: a third of `n`, at least 4; all of it in `make test-long`."""
    return n if settings().max_examples > 100 else min(n, max(4, n // 3))


def rarely(*cases: Any) -> list[Any]:
    """These parameters of a test only in `make test-long`."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long) for case in cases]


def some_of(*axes: Any, few: int | None = None) -> list[Any]:
    """All combinations of the values of the axes, as parameters of a test; all but a few only in `make test-long`.

    few: so many; None: as many as the longest axis has values, which have every value of every axis.
    """
    n = max(len(axis) for axis in axes) if few is None else few
    # Shifted after each round, and each axis by its own step, so that they meet in more than equal places.
    chosen = {tuple((i + step * (i // len(axis))) % len(axis) for step, axis in enumerate(axes)) for i in range(n)}
    places = itertools.product(*(range(len(axis)) for axis in axes))
    cases = zip(places, itertools.product(*axes), strict=True)
    return [pytest.param(*case, marks=() if place in chosen else pytest.mark.long) for place, case in cases]
