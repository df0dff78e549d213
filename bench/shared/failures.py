"""What a measurement may fail with, and what a row then says. Anything else is a bug, and ends the run."""

from typing import Any

import torch

# What the machine lacks, or a method, or the package that a method needs.
FAILURES = (ImportError, MemoryError, RuntimeError, ValueError)


def status_of(error: BaseException) -> str:
    """ "oom" for want of memory on either side, else "failed"."""
    wanting = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return "oom" if wanting else "failed"


def reason_of(error: BaseException) -> str:
    """The first line of what the error says, or its kind if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def fail(row: dict[str, Any], error: BaseException) -> dict[str, Any]:
    """Write status and reason into the row, and return it."""
    row |= {"status": status_of(error), "reason": reason_of(error)}
    return row


class Failing:
    """Inside, what goes wrong becomes the row's reason."""

    def __init__(self, row: dict[str, Any]) -> None:
        self._row = row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, FAILURES):
            return False
        fail(self._row, error)
        return True
