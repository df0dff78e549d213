"""Runs of `bench needle`: a grid of lengths and depths."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from retrieval_attn.bench.quality.measure import Output, read_haystack, run
from retrieval_attn.bench.quality.options import Settings
from retrieval_attn.bench.shared.report import Report

if TYPE_CHECKING:
    from retrieval_attn.bench.quality.examples import Prompts
    from retrieval_attn.bench.quality.runner import Planned
    from retrieval_attn.llm import LLM


def measure(settings: Settings, output: Output) -> Report:
    """The report of a grid."""
    text = read_haystack(settings.text)

    def plan(llm: "LLM") -> list["Planned"]:
        from retrieval_attn.bench.quality.examples import Prompts

        return list(_plan(settings, text, llm, Prompts(llm)))

    report = run(settings, output, plan)
    report["notes"] += NOTES
    return report


NOTES = [
    "needle and question as in MInference's test; right if the number is in the answer",
    "the text was read exactly, once for all methods; with followup=retrieve the question goes through the method, too",
]


def depths_of(n: int) -> list[float]:
    """n places from 0 to 1, evenly.

    >>> depths_of(3), depths_of(1)
    ([0.0, 0.5, 1.0], [0.5])
    """
    return [i / (n - 1) for i in range(n)] if n > 1 else [0.5]


def _plan(settings: Settings, text: str | None, llm: "LLM", prompts: "Prompts") -> Iterator["Planned"]:
    from retrieval_attn.bench.needle.tasks import needle_id, needle_maker
    from retrieval_attn.bench.quality.examples import fit
    from retrieval_attn.bench.quality.plan import require_room
    from retrieval_attn.bench.quality.runner import MULTI_REQUEST, Planned

    require_room(settings, llm.max_tokens)
    places, plain = depths_of(settings.options["depths"]), settings.options["plain"]
    texts = [places] if settings.options["together"] else [[depth] for depth in places]
    wanted = [
        (context, sample, depths)
        for context in settings.contexts
        for sample in range(settings.samples)
        for depths in texts
    ][: settings.limit]
    for context, sample, depths in wanted:
        maker = needle_maker(context, depths, sample, settings.seed, text, plain)
        make = partial(fit, maker, context, prompts, llm.max_tokens)
        depth = depths[0] if len(depths) == 1 else None
        yield Planned("needle", context, needle_id(context, depths, sample), MULTI_REQUEST, make, depth)
