"""One HTML page of all reports: a section per kind, and in it tables, a picture, machine and commit per report."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from retrieval_attn.bench.report.plots import picture
from retrieval_attn.bench.report.read import KINDS, Found, ReportFile
from retrieval_attn.bench.report.tables import cell, tables
from retrieval_attn.bench.shared.pictures import NO_PICTURES, can_draw
from retrieval_attn.bench.shared.report import Row

# Headings, and what a section is about.
_SECTIONS = {
    "latency": ("Latency of a step", "What one token costs at a context, beside stock attention in the same run."),
    "recall": ("Recall of the search", "Which of the best keys an index finds, against the time of the search alone."),
    "compare": ("Quality against time", "Scores of methods on the same questions, beside their time per token."),
    "needle": ("Needle in a haystack", "One planted fact, by length of the text and by where in it the fact stands."),
    "ruler": ("RULER", "Synthetic tasks over a long context (arXiv 2404.06654)."),
    "scbench": ("SCBench", "Several turns about one shared context (arXiv 2412.10319)."),
    "ppl": ("Perplexity", "How well the tokens of a text are foretold, and how often full attention says the same."),
    "fidelity": ("Fidelity of heads", "The output of every head beside that of full attention."),
    "memory": ("Memory", "The peak of every phase beside what was planned, and the times of a session."),
    "long": ("Long answers", "Speed and memory along one long answer."),
    "kernels": ("Kernels", "Attention over a prompt, dense and sparse, beside PyTorch's own."),
}


class _Section(NamedTuple):
    kind: str
    heading: str
    about: str
    reports: list[ReportFile]


def page(found: Found) -> str:
    """The page, complete in itself: it runs nothing and fetches nothing. The same reports give the same text.

    Without matplotlib it has no pictures, and says so.
    """
    from jinja2 import Environment, StrictUndefined

    # What reports say is text, never markup.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        found=found,
        no_pictures="" if can_draw() else NO_PICTURES,
        n_rows=sum(len(report.rows) for report in found.reports),
        sections=[_Section(kind, *_SECTIONS[kind], found.of(kind)) for kind in KINDS if found.of(kind)],
        picture_of=picture if can_draw() else lambda report: None,
        cell=cell,
        place=_place,
        provenance=provenance,
        settings=_settings,
        tables=tables,
    )


def provenance(report: ReportFile) -> Iterator[str]:
    """Machine, GPU, versions, commit and date."""
    env = report.env
    yield f"{env.get('cpu') or 'unknown CPU'}, {env.get('cores') or '?'} cores, {env.get('threads') or '?'} threads"
    driver = f" (driver {env['gpu_driver']})" if env.get("gpu_driver") else ""
    yield f"GPU {env['gpu']}{driver}" if env.get("gpu") else "no GPU"
    packages = (env.get("packages") or {}).items()
    yield ", ".join(f"{name} {version}" for name, version in packages if version) or "unknown versions"
    yield f"commit {report.commit}"
    if env.get("date"):
        yield str(env["date"])


def _place(report: ReportFile) -> str:
    """The place of a report on the page; never the name of a section."""
    return "report-" + re.sub(r"[^\w.-]", "-", report.path.stem)


def _settings(config: Row) -> list[tuple[str, str]]:
    """What a benchmark was asked for, as words; what was left open is left out."""
    return [(name, _words(value)) for name, value in config.items() if value not in (None, [], {}, "")]


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_words(part)}" for name, part in value.items())
    return str(value)
