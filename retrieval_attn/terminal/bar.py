"""Bars for prefill and for index builds."""

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from retrieval_attn.terminal.shown import count

if TYPE_CHECKING:
    from retrieval_attn import generate
    from retrieval_attn.session import Session

# Prompts shorter than the first are read without a bar; longer than the second, with a word about memory.
BAR_TOKENS, PLAN_TOKENS = 256, 4096


class PhaseBar:
    """Draws prefill and index builds on a console; an instance is an `on_progress`. Use it in a `with` block.

    Short prompts get no bar. Off a terminal only the finished bar is printed.
    """

    def __init__(self, console: Console, session: "Session") -> None:
        self._console = console
        self._session = session
        self._bar: Progress | None = None
        self._started = 0.0

    def __enter__(self) -> "PhaseBar":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __call__(self, progress: "generate.Progress") -> None:
        self.show(progress.phase, progress.done, progress.total)

    def show(self, phase: str, done: float, total: int) -> None:
        """`done` of `total` tokens (phase "prefill") or indexes (phase "build"); a phase begins with 0 done."""
        if done == 0:
            self.close()
            self._bar = self._begin(phase, total)
        if self._bar is None:
            return
        self._bar.update(self._bar.task_ids[0], completed=done, note=self._note(phase, done, total))
        if done >= total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _begin(self, phase: str, total: int) -> Progress | None:
        cached = self._session.cache.get_seq_length()
        if (phase == "prefill" and total < BAR_TOKENS) or cached + total < BAR_TOKENS:
            return None
        if phase == "build" and cached < self._session.llm.config.exact_below:
            return None
        if phase == "prefill" and total >= PLAN_TOKENS:
            plan = f"memory for {self._session.llm.plan(cached + total)}"
            self._console.print(plan, style="dim", highlight=False, soft_wrap=True)
        self._started = time.perf_counter()
        what = "reading" if phase == "prefill" else "building index"
        if phase == "prefill" and cached:
            what += f" ({count(cached)} cached)"
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        )
        bar.add_task(what, total=total, note="")
        bar.start()
        return bar

    def _note(self, phase: str, done: float, total: int) -> str:
        if phase == "build":
            return f"{int(done)}/{total}"
        speed = done / max(time.perf_counter() - self._started, 1e-9)
        return f"{count(int(done))}/{count(total)} tok" + (f" · {count(round(speed))} tok/s" if done else "")


def wait_for_indexes(session: "Session", bar: PhaseBar) -> None:
    """Wait until every far key is indexed. An interrupted wait leaves the builds going on in the background."""
    from retrieval_attn import generate

    session.cache.start_builds()
    generate.follow_builds(session.cache, bar)
