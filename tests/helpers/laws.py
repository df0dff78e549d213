"""How many examples a law is tried on, and how often chance is given its turn."""

from hypothesis import settings


def examples(n: int) -> settings:
    """Decorator: n examples, and five times as many in `make test-long`; 100 and 500 without it."""
    return settings(max_examples=n * settings().max_examples // 100)


def times(n: int) -> int:
    """How often to try what only chance can find: a third of `n`, at least 4; all of it in `make test-long`."""
    return n if settings().max_examples > 100 else max(4, n // 3)
