"""Runs examples through methods, one row per answer: what is common is read once, and nothing done is lost."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from retrieval_attn.atomic_file import write_whole
from retrieval_attn.bench.methods.bench import Bench
from retrieval_attn.bench.methods.named import Method
from retrieval_attn.bench.methods.talk import Answer, Read, Talk
from retrieval_attn.bench.quality.examples import Example, Prompts
from retrieval_attn.bench.quality.rows import ROW_FIELDS
from retrieval_attn.bench.quality.scoring import score
from retrieval_attn.bench.shared.failures import FAILURES, fail
from retrieval_attn.bench.shared.machine import PeakMemory
from retrieval_attn.bench.shared.report import Row, short

MULTI_TURN, MULTI_REQUEST = MODES = ("multi-turn", "multi-request")


@dataclass(frozen=True)
class Planned:
    """An example yet to be made: of which task and length, and how. example: its id. Examples are large; plans are
    small, and name their rows before anything is made."""

    task: str
    context: int
    example: str
    mode: str
    make: Callable[[], Example]
    depth: float | None = None


class Advance(NamedTuple):
    """What is being done, and the share of all work that is done."""

    what: str
    share: float


OnAdvance = Callable[[Advance], None]


class Runner:
    """Runs what is planned. share: read each prompt once for all methods that may; else each reads it, and is timed."""

    def __init__(
        self,
        bench: Bench,
        methods: Sequence[Method],
        device: str,
        share: bool = True,
        on_advance: OnAdvance | None = None,
    ) -> None:
        self._bench, self._methods, self._device, self._share = bench, methods, device, share
        self._prompts = Prompts(bench.llm)
        self._on_advance = on_advance or (lambda advance: None)
        self._hopeless: dict[str, str] = {}
        self._done = self._total = 0.0
        # The context read last: the other mode of the same example begins with it.
        self._last: tuple[tuple[str, int, str], Read] | None = None

    def rows(self, plan: Sequence[Planned], done: Sequence[Row] = ()) -> Iterator[Row]:
        """The rows of the plan, without those of `done`, as they are made.

        A method that was interrupted between the turns of an example goes through all of them again: rows of `done`
        that have not all turns must not be given.
        """
        known = {(row["task"], row["context"], row["example"], row["mode"], row["method"]) for row in done}
        left = [(one, [m for m in self._methods if (*_key(one), m.label) not in known]) for one in plan]
        self._total = sum(self._weight(one, self._methods) for one in plan)
        self._done = self._total - sum(self._weight(one, methods) for one, methods in left)
        for one, methods in left:
            if methods:
                until = self._done + self._weight(one, methods)
                yield from self._example(one, methods)
                self._done = until

    def _weight(self, one: Planned, methods: Sequence[Method]) -> float:
        n_reads = min(1, len(methods)) if self._share else len(methods)
        return n_reads * _cost(one.context) + len(methods) * _METHOD_WEIGHT * one.context

    def _example(self, one: Planned, methods: Sequence[Method]) -> Iterator[Row]:
        try:
            example = one.make()
        except ValueError as error:
            yield from (failed(one, method.label, error) for method in methods)
            return
        ids = self._prompts.context(example)
        # In many turns the first question is read with the context, as in SCBench; all but its last token.
        start = ids if one.mode == MULTI_REQUEST else self._prompts.request(ids, example, 0)[:-1]
        try:
            read = self._read(one, ids, start) if self._share and any(m.shares_prefill for m in methods) else None
        except FAILURES as error:
            yield from (failed(one, method.label, error) for method in methods if method.shares_prefill)
            methods, read = [method for method in methods if not method.shares_prefill], None
        for method in methods:
            self._tell(one, method.label, 0)
            yield from self._method(one, example, method, ids, start, read)
            self._done += _METHOD_WEIGHT * one.context + (0 if self._share else _cost(one.context))

    def _read(self, one: Planned, ids: list[int], start: list[int]) -> Read:
        name = one.task, one.context, one.example
        if self._last is None or self._last[0] != name:
            self._last = None  # Before the next one is read: it may be as large as memory allows.
            whole = _cost(one.context)
            self._last = (
                name,
                self._bench.read(
                    ids, lambda p: self._tell(one, "reading", whole * _cost(p.done) / _cost(max(1, p.total)))
                ),
            )
        self._done += _cost(one.context)
        context = self._last[1]
        return context if start == ids else self._bench.read(start, after=context)

    def _method(
        self, one: Planned, example: Example, method: Method, ids: list[int], start: list[int], read: Read | None
    ) -> Iterator[Row]:
        if method.label in self._hopeless:
            yield failed(one, method.label, ImportError(self._hopeless[method.label]))
            return
        peak = PeakMemory(self._device)
        n_done = 0
        try:
            self._bench.prepare(method)
            with peak:
                talk = self._bench.start(method, start, read)
            for row in self._turns(one, example, method, talk, ids, peak):
                n_done += 1
                yield row
        except FAILURES as error:
            if isinstance(error, ImportError):
                self._hopeless[method.label] = str(error)
            yield failed(one, method.label, error, turn=n_done + 1 if n_done else None)

    def _turns(
        self, one: Planned, example: Example, method: Method, talk: Talk, ids: list[int], peak: PeakMemory
    ) -> Iterator[Row]:
        asked = self._prompts.request(ids, example, 0)
        for number, turn in enumerate(example.turns):
            if one.mode == MULTI_REQUEST:
                asked, speaking = self._prompts.request(ids, example, number), talk.fork()
            else:
                asked, speaking = self._prompts.follow_up(asked, example, number) if number else asked, talk
            with peak:
                said = speaking.answer(asked, turn.max_new_tokens)
            row = blank_row(one, method.label)
            row.update(turn=number + 1, part=turn.part, depth=turn.depth, prompt_tokens=len(asked))
            row.update(answer=said.text, refs=list(turn.refs), score=score(turn.scorer, said.text, turn.refs))
            row.update(_costs(said, talk, peak))
            if one.mode == MULTI_TURN and number == 0:
                # Of this question all but the last token was read with the context.
                row["ttft_ms"] = None
            yield {**row, "status": "ok", "last": number + 1 == len(example.turns)}

    def _tell(self, one: Planned, what: str, within: float) -> None:
        self._on_advance(Advance(f"{one.task} {short(one.context)}: {what}", (self._done + within) / self._total))


# Of work: reading a token, with what precedes it; and what each method does with a prompt, as reading some of it.
_QUADRATIC_FROM = 32768
_METHOD_WEIGHT = 0.15


def _cost(tokens: float) -> float:
    return tokens * (1 + tokens / _QUADRATIC_FROM)


def _key(one: Planned) -> tuple[str, int, str, str]:
    return one.task, one.context, one.example, one.mode


def blank_row(one: Planned, label: str) -> Row:
    """A row with every field, unmeasured."""
    row: Row = {**dict.fromkeys(ROW_FIELDS), "method": label, "status": "failed", "reason": "", "depth": one.depth}
    return {**row, **dict(zip(("task", "context", "example", "mode"), _key(one), strict=True))}


def failed(one: Planned, label: str, error: Exception, turn: int | None = None) -> Row:
    """The row of a method that could not go through with an example, with its reason. turn: the one it failed at; None
    if at all of them."""
    return fail({**blank_row(one, label), "turn": turn}, error)


def _costs(said: Answer, talk: Talk, peak: PeakMemory) -> Row:
    return {
        "ttft_ms": 1e3 * said.ttft_s,
        "read_ms": 1e3 * talk.read_s,
        "build_ms": 1e3 * talk.build_s,
        "tpot_ms": 1e3 * sum(said.itl_s) / len(said.itl_s) if said.itl_s else None,
        "visited_pct": None if said.visited is None else 100 * said.visited,
        "kv_bytes": said.host_kv_bytes + said.device_kv_bytes,
        "device_kv_bytes": said.device_kv_bytes,
        "index_bytes": said.index_bytes,
        "rss_bytes": peak.rss,
        "peak_device_bytes": peak.device or None,
    }


class Kept:
    """Rows on disk while a run goes on, so that neither Ctrl-C nor a crash costs what was done.

    A line of JSON each, behind one with the settings; the file is gone when the report is written.
    """

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool) -> None:
        """out: the report, beside which rows are kept.

        Raises ValueError if rows of an earlier run lie there and `resume` is false, or were made with other settings;
        naming the first that differs. Nothing is overwritten then.
        """
        self.path = out.with_name(out.name + ".part")
        if resume and not self.path.exists() and out.exists():
            raise ValueError(f"--resume: {out} is finished; leave --resume away to run anew")
        self._settings = json.loads(json.dumps(settings))
        self.rows: list[Row] = self._found(out, resume) if self.path.exists() else []
        self._begun = False

    def _found(self, out: Path, resume: bool) -> list[Row]:
        try:
            # A line that was being written when the run ended has no end; it is done again.
            lines = [json.loads(line) for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
            settings = lines[0]["settings"]
        except (json.JSONDecodeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not what a run leaves behind; delete it to begin anew") from error
        if len(lines) == 1:
            return []
        if not resume:
            raise ValueError(
                f"{self.path} holds what an earlier run has done; go on with --resume, or delete it to begin anew"
            )
        for name in sorted({*settings, *self._settings}):
            before, now = settings.get(name), self._settings.get(name)
            if before != now:
                raise ValueError(
                    f"--resume: {name} was {before!r} in {self.path} and is {now!r} now; ask for the same, or write to "
                    f"another file than {out}"
                )
        return whole(lines[1:])

    def add(self, row: Row) -> None:
        """Keep a row, before the next one is begun."""
        if not self._begun:
            self._begin()
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _begin(self) -> None:
        """Write what is kept so far to a new file, and put that in the place of the old one: never is there none."""
        lines = [{"settings": self._settings}, *self.rows]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines), durable=True)
        self._begun = True

    def close(self) -> None:
        """The report is written: rows need not be kept any more."""
        self.path.unlink(missing_ok=True)


def whole(rows: Sequence[Row]) -> list[Row]:
    """Without the last group of rows (of one method and example) if there may be more to come: `last` is not set."""
    kept, group = list[Row](), list[Row]()
    for row in rows:
        group.append(row)
        if row.get("last", True):
            kept += group
            group = []
    return kept


def collect(rows: Iterator[Row], kept: Kept | None, tell: Callable[[str], None]) -> list[Row]:
    """All rows, kept ones first. On Ctrl-C says where they are, and lets it pass."""
    done = [] if kept is None else list(kept.rows)
    started = time.perf_counter()
    try:
        for row in rows:
            done.append(row)
            if kept is not None:
                kept.add(row)
    except KeyboardInterrupt:
        where = f"; they are in {kept.path}, and --resume goes on from there" if kept else "; with --out they are kept"
        tell(f"interrupted after {len(done)} answers ({time.perf_counter() - started:.0f} s){where}")
        raise
    return done
