"""One HTML page of all reports: a section per kind, and in it tables, a picture, machine and commit per report."""

import re
from html import escape

from retrieval_attn.bench.report.plots import plot
from retrieval_attn.bench.report.read import KINDS, Found, Report
from retrieval_attn.bench.report.style import STYLE
from retrieval_attn.bench.report.tables import as_html, settings, tables

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


def page(found: Found) -> str:
    """The page, complete in itself: it runs nothing and fetches nothing. The same reports give the same text.

    Needs matplotlib.
    """
    kinds = [kind for kind in KINDS if found.of(kind)]
    n_rows = sum(len(report.rows) for report in found.reports)
    sections = "\n".join(_section(kind, found.of(kind)) for kind in kinds)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>retrieval-attn: measurements</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>\n"
        "<h1>retrieval-attn: measurements</h1>\n"
        f"<p>{_count(len(found.reports), 'report')} with {_count(n_rows, 'row')}, as <code>retrieval-attn bench</code> "
        "wrote them. Each names the machine, the versions and the commit that its numbers come from; numbers of "
        "different machines do not compare.</p>\n</header>\n"
        f"{_skipped(found)}{_contents(found, kinds)}\n<main>\n{sections}\n</main>\n</body>\n</html>\n"
    )


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}" + ("" if n == 1 else "s")


def _skipped(found: Found) -> str:
    lines = "".join(f"<li><code>{escape(name)}</code>: {escape(reason)}</li>\n" for name, reason in found.skipped)
    return f'<div class="skipped"><b>Skipped:</b>\n<ul>\n{lines}</ul></div>\n' if lines else ""


def _contents(found: Found, kinds: list[str]) -> str:
    lines = []
    for kind in kinds:
        names = " ".join(f'<li><a href="#{_id(r)}">{escape(r.path.stem)}</a></li>' for r in found.of(kind))
        lines.append(f'<li><a href="#{kind}">{escape(_SECTIONS[kind][0])}</a>\n<ul>{names}</ul></li>')
    listed = "\n".join(lines) or "<li>No report.</li>"
    return f'<nav aria-label="Contents">\n<h2>Contents</h2>\n<ul>\n{listed}\n</ul>\n</nav>'


def _section(kind: str, reports: list[Report]) -> str:
    heading, about = _SECTIONS[kind]
    parts = "\n".join(_article(report) for report in reports)
    return f'<section id="{kind}">\n<h2>{heading}</h2>\n<p class="what">{about}</p>\n{parts}\n</section>'


def _article(report: Report) -> str:
    """Where the numbers come from, the summary, the picture, and what is folded away."""
    summary = [as_html(table) for table in tables(report) if not table.folded]
    folded = [as_html(table) for table in tables(report) if table.folded]
    parts = [
        f'<article id="{_id(report)}">\n<h3>{escape(report.name)}</h3>',
        f'<p class="where">{" ".join(f"<span>{escape(part)}</span>" for part in provenance(report))}</p>',
        *(summary[:1] if report.rows else ["<p>No rows.</p>"]),
        _figure(report),
        *summary[1:],
        *folded,
        _folded_settings(report),
        _folded_notes(report),
        "</article>",
    ]
    return "\n".join(part for part in parts if part)


def provenance(report: Report) -> list[str]:
    """Machine, GPU, versions, commit and date, to be read in one line."""
    env = report.env
    packages = ", ".join(f"{name} {version}" for name, version in (env.get("packages") or {}).items() if version)
    cpu = f"{env.get('cpu') or 'unknown CPU'}, {env.get('cores') or '?'} cores, {env.get('threads') or '?'} threads"
    driver = f" (driver {env['gpu_driver']})" if env.get("gpu_driver") else ""
    gpu = f"GPU {env['gpu']}{driver}" if env.get("gpu") else "no GPU"
    parts = (cpu, gpu, packages or "unknown versions", f"commit {report.commit}", env.get("date"))
    said = [str(part) for part in parts if part]
    return [f"{part};" for part in said[:-1]] + said[-1:]


def _figure(report: Report) -> str:
    drawn = plot(report)
    if drawn is None:
        return ""
    picture = f'<div class="picture" tabindex="0">{drawn.svg}</div>'
    return f"<figure>\n{picture}\n<figcaption>{escape(drawn.caption)}</figcaption>\n</figure>"


def _folded_settings(report: Report) -> str:
    said = "; ".join(f"<b>{escape(name)}</b> {escape(value)}" for name, value in settings(report.config))
    return f'<details><summary>Settings</summary>\n<p class="settings">{said}</p>\n</details>' if said else ""


def _folded_notes(report: Report) -> str:
    lines = "\n".join(f"<li>{escape(note)}</li>" for note in report.notes)
    if not lines:
        return ""
    return f'<details><summary>Notes ({len(report.notes)})</summary>\n<ul class="notes">\n{lines}\n</ul>\n</details>'


def _id(report: Report) -> str:
    """The place of a report on the page; never the name of a section."""
    return "report-" + re.sub(r"[^\w.-]", "-", report.path.stem)
