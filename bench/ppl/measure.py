"""Runs over one text: the model is loaded, a task done, and reported."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from retrieval_attn.bench.methods.bench import Bench
from retrieval_attn.bench.methods.named import Method, parse_method
from retrieval_attn.bench.ppl.reading import Foretelling, Task, left_to_do, read_and_measure, require_room, text_ids
from retrieval_attn.bench.quality.measure import Output, as_report, load_llm, parse_methods, read_haystack
from retrieval_attn.bench.quality.options import Settings
from retrieval_attn.bench.quality.runner import collect
from retrieval_attn.bench.shared import machine
from retrieval_attn.bench.shared.bars import bar, say
from retrieval_attn.bench.shared.report import Report
from retrieval_attn.config import RetrievalConfig


def measure(settings: Settings, output: Output) -> Report:
    """The report of one text. Raises ValueError for a context that is longer than the text or the model."""
    text = read_haystack(settings.text)
    stretch = settings.options["stretch"]

    def begin(bench: Bench, methods: Sequence[Method]) -> tuple[list[int], Task]:
        # What is fed last foretells one more.
        longest, more = max(settings.contexts), stretch + 1
        ids = text_ids(bench.llm, text, longest + more, settings.seed)
        require_room(longest, more, len(ids), bench.llm)
        return ids, Foretelling(bench, ids, stretch, parse_method("full", methods[0].config))

    report = run(settings, output, begin)
    report["notes"] += [AGREEMENT, scanned_note(settings.config)]
    return report


AGREEMENT = "agreement: tokens whose likeliest one is full attention's; KL: from full attention, nats per token"


def scanned_note(config: RetrievalConfig) -> str:
    """What a report says of short contexts."""
    return f"far contexts shorter than exact_below ({config.exact_below}) are scanned exactly, whatever the index"


Begin = Callable[[Bench, Sequence[Method]], tuple[list[int], Task]]


def run(settings: Settings, output: Output, begin: Begin, load: Callable[[Settings], Any] = load_llm) -> Report:
    """Load the model, run a task over one text, report; returns what `quality.measure.run` does.

    begin: the text's token ids, and the task. Raises ValueError for an unknown method before the model is loaded.
    """
    methods = parse_methods(settings)
    device, threads = machine.prepare(settings.device, settings.config.threads)
    # Now, and not at the end: the commit is that of the code that runs.
    settings, env = replace(settings, device=device), machine.describe(threads)
    with bar(settings.bench) as advance:
        advance("loading the model", 0)
        bench = Bench(load(settings), partial(load_llm, settings))
        ids, task = begin(bench, methods)
        left = left_to_do(settings.contexts, methods, settings.limit, output.kept.rows if output.kept else ())
        rows = collect(read_and_measure(bench, ids, left, task, advance), output.kept, say)
    places = {label: i for i, label in enumerate(settings.methods)}
    rows.sort(key=lambda row: (settings.contexts.index(row["context"]), places[row["method"]]))
    return as_report(settings, env, rows)
