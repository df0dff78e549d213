"""What a person sees on stderr while something is measured; a log gets lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(what: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, with the time left; off a terminal a line whenever something else is done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not sys.stderr.isatty():
        said: list[str] = []

        def line(doing: str, share: float) -> None:
            if said[-1:] != [doing]:
                said.append(doing)
                say(f"{share:4.0%} {doing}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda doing, share: progress.update(task, completed=share, description=doing)


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


class Status:
    """What is being done, on stderr: a line that changes for a person, a line per finished row for a log."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console

        self._shown = shown
        self._line = Console(stderr=True).status("starting")

    def __enter__(self) -> "Status":
        if self._shown:
            self._line.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._line.stop()

    def doing(self, what: str) -> None:
        """This begins."""
        if self._shown:
            self._line.update(what)

    def finished(self, line: str) -> None:
        """A row is done, which this line is about."""
        if not self._shown:
            say(line)


class StepBar:
    """Progress on stderr with the time left: a unit for each of n steps, and what is being done."""

    def __init__(self, n: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)
        self._n, self._begun = n, False

    def __enter__(self) -> "StepBar":
        self._progress.start()
        self._task = self._progress.add_task("", total=self._n)
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def advance(self, what: str) -> None:
        """The last step is done and `what` begins."""
        self._progress.update(self._task, advance=1 if self._begun else 0, description=what)
        self._begun = True
