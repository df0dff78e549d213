"""How many examples a law is tried on."""

from hypothesis import settings


def examples(n: int) -> settings:
    """Decorator: n examples, and five times as many in `make test-long`; 100 and 500 without it."""
    return settings(max_examples=n * settings().max_examples // 100)
