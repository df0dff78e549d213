"""A long document, facts hidden in it, questions about them: retrieval beside full attention in stock transformers.

    retrieval-attn demo --tokens 65536

Both sides read the same token ids in the same dtype, and are asked the same questions, each against the document
alone. Stock transformers reads the document in one forward pass: it needs no mask then, and takes half the time that
chunks take. Memory is counted in bytes of keys and values; that of the whole process, model and libraries included, is
read after each side's last answer, when the other side's model is not there.
"""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache

from retrieval_attn.bench.shared.facts import Document, Fact, document
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.llm import EMBEDDED, LLM, load
from retrieval_attn.session import Session
from retrieval_attn.terminal.bar import PhaseBar, wait_for_indexes
from retrieval_attn.terminal.shown import count, size

# Facts in the document, or more if more are asked for: the others are there to be confused with them.
N_FACTS = 48
LEAST_TOKENS_PER_FACT = 40
MOST_NEW_TOKENS = 24

# Room for the question and its answer within the tokens asked for, and the shortest document worth it.
RESERVE, LEAST_TOKENS = 256, 2048

# Enough for a first index of the kind that is measured.
WARM_UP_TOKENS = 4096


class Question(NamedTuple):
    """A fact, where it stands in the document (0 to 1), and the document with the question behind it, as ids."""

    fact: Fact
    depth: float
    ids: list[int]


@dataclass
class Side:
    """What one side did. Seconds are wall clock, bytes are bytes.

    read_ids: the tokens read before any question. ttft_s: one entry per question, from asking to its first token.
    steps_s: one entry for each token after the first of an answer. index_s is None where there is no index,
    prefill_read where it is not known which share of the keys was read.
    """

    read_ids: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    read_s: float = 0.0
    index_s: float | None = None
    ttft_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    visited: list[float] = field(default_factory=list)
    device_bytes: int = 0
    host_bytes: int = 0
    index_bytes: int = 0
    process_bytes: int = 0
    prefill_read: float | None = 1.0


def run_demo(
    tokens: int,
    n_questions: int = 3,
    config: RetrievalConfig | None = None,
    console: Console | None = None,
    model: Path = EMBEDDED,
) -> int:
    """Run the comparison and print it. Returns 0 if all our answers are right, 1 if not.

    tokens: length of the document, with room for a question. n_questions: spread over the depths. config: of our side;
    its seed makes the document, too. model: a folder; by default the embedded model. Raises ValueError for numbers out
    of range.
    """
    if not 1 <= n_questions <= tokens // LEAST_TOKENS_PER_FACT:
        most = tokens // LEAST_TOKENS_PER_FACT
        raise ValueError(f"n_questions must be between 1 and {most} for {tokens} tokens, got {n_questions}")
    console, config = console or Console(), config or RetrievalConfig()
    with console.status("loading the model"):
        llm = load(model, config)
    with console.status("writing the document"):
        text, questions = make_questions(llm, tokens, n_questions, config.seed)
    n_facts = max(N_FACTS, n_questions)
    _say(console, f"a document of {count(len(questions[0].ids))} tokens with {n_facts} facts in it")
    with console.status("warming up (the first time, compiling CPU kernels)"):
        llm.generate(questions[0].ids[:WARM_UP_TOKENS], max_new_tokens=3)
    ours = ask_retrieval(llm, text, questions, console)
    machine, tokenizer, stops = machine_line(llm), llm.tokenizer, llm.stop_ids()
    # Our model and cache go before the other side's come, so that neither pays for the other.
    del llm
    gc.collect()
    full = ask_full_attention(model, ours.read_ids, questions, stops, tokenizer, console)
    console.print(comparison(ours, full, questions))
    _say(console, machine)
    return verdict(ours, questions, console)


def make_questions(llm: LLM, tokens: int, n_questions: int, seed: int) -> tuple[str, list[Question]]:
    """A document, and questions about facts spread over its depths."""
    if not LEAST_TOKENS <= tokens < llm.max_tokens:
        raise ValueError(f"tokens must be between {LEAST_TOKENS} and {llm.max_tokens - 1}, got {tokens}")
    n_facts = max(N_FACTS, n_questions)
    doc = document(lambda text: len(llm.encode_text(text)), tokens - RESERVE, n_facts, seed)
    chosen = [int((i + 0.5) * n_facts / n_questions) for i in range(n_questions)]
    return doc.text, [Question(doc.facts[i], doc.depths[i], _ids(llm, doc, doc.facts[i])) for i in chosen]


def _ids(llm: LLM, doc: Document, fact: Fact) -> list[int]:
    return llm.encode([{"role": "user", "content": f"{doc.text}\n\n{fact.question}"}])


def ask_retrieval(llm: LLM, text: str, questions: Sequence[Question], console: Console) -> Side:
    """Our side: read the document, index it, answer each question from the document's cache."""
    side, session = Side(), llm.session()
    try:
        with PhaseBar(console, session) as bar:
            started = time.perf_counter()
            side.prefill_read = session.read(text, on_progress=bar).prefill_read
            side.read_s = time.perf_counter() - started
            wait_for_indexes(session, bar)
            side.index_s = time.perf_counter() - started - side.read_s
        side.read_ids = session.token_ids
        for question in questions:
            _announce(console, question)
            side.answers.append(_answer(session, question, side, console))
    finally:
        session.cache.cancel_builds()
    side.process_bytes = psutil.Process().memory_info().rss
    return side


def _answer(session: Session, question: Question, side: Side, console: Console) -> str:
    """The session goes back to the document by itself: only what follows the common prefix is run."""
    started = time.perf_counter()
    for i, piece in enumerate(session.stream_answer(question.ids, max_new_tokens=MOST_NEW_TOKENS)):
        if i == 0:
            side.ttft_s.append(time.perf_counter() - started)
        console.out(piece, end="", highlight=False)
    console.print()
    assert session.last is not None
    stats = session.last.stats
    side.steps_s += stats.itl_s
    side.visited.append(stats.visited_fraction)
    side.device_bytes, side.host_bytes = stats.device_kv_bytes, stats.host_kv_bytes
    side.index_bytes = stats.index_bytes
    return session.last.text.strip()


@torch.no_grad()
def ask_full_attention(
    source: Path,
    read_ids: list[int],
    questions: Sequence[Question],
    stop_ids: Sequence[int],
    tokenizer: Any,
    console: Console,
) -> Side:
    """The other side: stock transformers with sdpa, the same ids, a cache that goes back between questions."""
    side = Side(read_ids=common_prefix([read_ids, *(question.ids for question in questions)]), visited=[1.0])
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", dtype="auto").eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    n_read = len(side.read_ids)
    _greedy(model, DynamicCache(config=model.config), read_ids[:WARM_UP_TOKENS], stop_ids, Side())
    cache = DynamicCache(config=model.config)
    with console.status(f"full attention reads the same {count(n_read)} tokens, in one pass"):
        started = time.perf_counter()
        model.base_model(input_ids=_row(side.read_ids, model), **cache_argument(cache), use_cache=True)
        side.read_s = time.perf_counter() - started
    _say(console, f"full attention read {count(n_read)} tokens in {side.read_s:.1f} s")
    for question in questions:
        _announce(console, question)
        answer = _greedy(model, cache, question.ids[n_read:], stop_ids, side)
        side.answers.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
        console.out(f" {side.answers[-1]}", highlight=False)
        cache.crop(n_read - cache.get_seq_length())
    side.device_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    side.process_bytes = psutil.Process().memory_info().rss
    return side


def _greedy(model: Any, cache: DynamicCache, ids: list[int], stop_ids: Sequence[int], side: Side) -> list[int]:
    """The likeliest tokens after `ids`, up to and with a stop token; their times go into `side`."""
    answer: list[int] = []
    started = time.perf_counter()
    while not answer or (answer[-1] not in stop_ids and len(answer) < MOST_NEW_TOKENS):
        new = _row(answer[-1:] or ids, model)
        logits = model(input_ids=new, **cache_argument(cache), use_cache=True, logits_to_keep=1).logits
        answer.append(int(logits[0, -1].argmax()))
        seconds, started = time.perf_counter() - started, time.perf_counter()
        (side.steps_s if len(answer) > 1 else side.ttft_s).append(seconds)
    return answer


def _row(ids: Sequence[int], model: Any) -> torch.Tensor:
    return torch.tensor([ids], device=model.device)


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """What all sequences begin with."""
    n = min(map(len, sequences))
    first = sequences[0]
    end = next((i for i in range(n) if any(other[i] != first[i] for other in sequences[1:])), n)
    return list(first[:end])


def comparison(ours: Side, full: Side, questions: Sequence[Question]) -> Table:
    """Both sides in one table."""
    table = Table(title=f"the same {count(len(full.read_ids))} tokens, the same {len(questions)} questions")
    table.add_column("")
    table.add_column("retrieval", justify="right")
    table.add_column("full attention", justify="right")
    for name, show in ROWS.items():
        table.add_row(name, show(ours, questions), show(full, questions))
    return table


def _first(side: Side, questions: Sequence[Question]) -> str:
    return f"{side.read_s + (side.index_s or 0) + side.ttft_s[0]:.1f} s"


def _next(side: Side, questions: Sequence[Question]) -> str:
    return f"{statistics.median(side.ttft_s[1:]):.2f} s" if len(questions) > 1 else "-"


def _step(side: Side, questions: Sequence[Question]) -> str:
    return f"{1000 * statistics.median(side.steps_s):.1f} ms" if side.steps_s else "-"


ROWS: dict[str, Callable[[Side, Sequence[Question]], str]] = {
    "answers right": lambda side, asked: f"{n_right(side, asked)} of {len(asked)}",
    "first token, first question (reads all)": _first,
    "first token, next questions (median)": _next,
    "prefill": lambda side, asked: f"{side.read_s:.1f} s",
    "keys read in prefill": lambda side, asked: "?" if side.prefill_read is None else f"{side.prefill_read:.0%}",
    "index build after it": lambda side, asked: "-" if side.index_s is None else f"{side.index_s:.1f} s",
    "each further token (median)": _step,
    "keys visited": lambda side, asked: f"{100 * statistics.mean(side.visited):.2f} %",
    "keys and values on the device": lambda side, asked: size(side.device_bytes),
    "keys and values in host memory": lambda side, asked: size(side.host_bytes) if side.host_bytes else "-",
    "index in host memory": lambda side, asked: size(side.index_bytes) if side.index_bytes else "-",
    "memory of the process": lambda side, asked: size(side.process_bytes),
}


def n_right(side: Side, questions: Sequence[Question]) -> int:
    """Answers that are the fact's value, to the letter."""
    return sum(answer == asked.fact.answer for answer, asked in zip(side.answers, questions, strict=True))


def verdict(ours: Side, questions: Sequence[Question], console: Console) -> int:
    """Exit status: 0 if every answer of ours is right; the wrong ones are named."""
    for answer, (fact, depth, _) in zip(ours.answers, questions, strict=True):
        if answer != fact.answer:
            line = f"wrong: {fact.question} At depth {depth:.0%} stands {fact.answer!r}, the answer was {answer!r}"
            console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    return int(n_right(ours, questions) < len(questions))


def machine_line(llm: LLM) -> str:
    """Where the numbers come from."""
    where = torch.cuda.get_device_name() if llm.model.device.type == "cuda" else _cpu_name()
    return (
        f"{psutil.cpu_count()} cores, {where}, torch {torch.__version__} with {torch.get_num_threads()} threads, "
        f"{str(llm.model.dtype).removeprefix('torch.')}, {llm.model.num_parameters() / 1e6:.1f} M parameters"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _announce(console: Console, question: Question) -> None:
    line = f"\nat depth {question.depth:.0%}: {question.fact.question}"
    console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)


def _say(console: Console, line: str) -> None:
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
