"""One context of `retrieval-attn bench memory`, in a process of its own: every phase, its peak beside its plan.

    python -m retrieval_attn.bench.memory.one_context '{"tokens": 8192, "model": null, "index": "graph", ...}'

Prints a row as one line of JSON; see `measure`.
"""

import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from retrieval_attn.bench.demo import MOST_NEW_TOKENS, Question, make_questions
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.generate import follow_builds
from retrieval_attn.llm import EMBEDDED, LLM, load
from retrieval_attn.plan.plan import Base, Target, plan_phases
from retrieval_attn.session import Session
from retrieval_attn.terminal.plan_report import measure_libraries, weight_bytes

# Linux: what is written here makes the process's highest mark begin anew.
_CLEAR = Path("/proc/self/clear_refs")

# The dtype of the libraries' warm-up, before the model's own is known; all of them compile the same amount.
_WARM_DTYPE = torch.bfloat16


class Peaks:
    """The largest resident memory of this process in each phase, and its seconds.

    Where the system cannot begin a highest mark anew (`exact` is False), a phase shows the highest of all before it.
    """

    def __init__(self) -> None:
        self.host: dict[str, int] = {}
        self.device: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.exact = _CLEAR.exists()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside is this phase."""
        if self.exact:
            _CLEAR.write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.host[name] = _highest(self.exact)
        if torch.cuda.is_available():
            self.device[name] = torch.cuda.max_memory_allocated()


def _highest(exact: bool) -> int:
    if not exact:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(tokens: int, model: str | None, device: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Load, read a document, ask, save to `folder`, restore and ask again; returns peaks, plans and times.

    options: of `RetrievalConfig`; its seed makes the document, too. The phase "restore" ends with the answer that
    follows it: what is mapped is in memory only once it is read.
    """
    config = RetrievalConfig.from_dict(options)
    libraries = measure_libraries(config, _WARM_DTYPE)
    peaks = Peaks()
    with peaks.phase("load"):
        llm = load(model, config, device=device)
    text, questions = make_questions(llm, tokens, 2, config.seed)
    session = llm.session()
    answers = _read_and_ask(session, text, questions, peaks)
    with peaks.phase("save"):
        session.save(folder / "session")
    held = _held(session)
    # The first session goes before the second comes, as it would from one process to the next.
    del session
    gc.collect()
    with peaks.phase("restore"):
        started = time.perf_counter()
        restored = llm.restore(folder / "session")
        restore_s = time.perf_counter() - started
        after_restore, answer = _ask(restored, questions[0])
    right = sum(
        a == q.fact.answer for a, q in zip([*answers["texts"], answer], [*questions, questions[0]], strict=True)
    )
    return {
        "tokens": len(questions[0].ids),
        "planned": _planned(llm, len(questions[0].ids), libraries),
        "measured": {name: {"host": peaks.host[name], "device": peaks.device.get(name, 0)} for name in peaks.host},
        "exact_peaks": peaks.exact,
        **held,
        **_times(peaks, answers["first_s"]),
        "restore_s": restore_s,
        "first_token_after_restore_s": restore_s + after_restore,
        "answers_right": right,
        "answers": 3,
    }


def _read_and_ask(session: Session, text: str, questions: list[Question], peaks: Peaks) -> dict[str, list[Any]]:
    with peaks.phase("prefill"):
        session.read(text)
    with peaks.phase("build"):
        follow_builds(session.cache, lambda progress: None)
    with peaks.phase("decode"):
        asked = [_ask(session, question) for question in questions]
    return {"first_s": [first for first, _ in asked], "texts": [answer for _, answer in asked]}


def _ask(session: Session, question: Question) -> tuple[float, str]:
    """Seconds to the first piece of the answer, and the answer."""
    started = time.perf_counter()
    first = 0.0
    for i, _ in enumerate(session.stream_answer(question.ids, max_new_tokens=MOST_NEW_TOKENS)):
        first = time.perf_counter() - started if i == 0 else first
    assert session.last is not None
    return first, session.last.text.strip()


def _planned(llm: LLM, n_tokens: int, libraries: int) -> dict[str, dict[str, Any]]:
    """Per phase the planned bytes, whole and by term."""
    weights = weight_bytes(llm.model.config, llm.model.dtype)
    target = Target(llm.model.device.type)
    if target.on_cuda:
        target = Target(target.device, torch.cuda.get_device_properties(llm.model.device).total_memory)
    base = Base(libraries, weights, weights)
    phases = plan_phases(llm.model.config, n_tokens, llm.model.dtype, llm.config, base, target)
    return {
        phase.name: {"host": phase.host, "device": phase.device, "host_terms": dict(phase.host_terms)}
        for phase in phases
    }


def _held(session: Session) -> dict[str, int]:
    assert session.last is not None
    stats = session.last.stats
    return {"kv_bytes": stats.host_kv_bytes, "index_bytes": stats.index_bytes}


def _times(peaks: Peaks, first_s: list[float]) -> dict[str, float]:
    """Seconds as a user waits for them: the first question waits for the document, too."""
    seconds = peaks.seconds
    return {
        "load_s": seconds["load"],
        "prefill_s": seconds["prefill"],
        "build_s": seconds["build"],
        "ttft_s": seconds["prefill"] + seconds["build"] + first_s[0],
        "second_question_s": first_s[1],
        "save_s": seconds["save"],
    }


def main() -> None:
    """Measure what the only argument names, and print the row."""
    asked = json.loads(sys.argv[1])
    asked["model"] = asked["model"] or str(EMBEDDED)
    with tempfile.TemporaryDirectory(prefix="memory-", dir=asked.pop("save")) as folder:
        row = measure(**asked, folder=Path(folder))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
