"""The search for patterns in the terminal: a bar while it lasts, a table of what was found."""

from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from retrieval_attn.search_patterns import SearchedPatterns, choose_budget, search_patterns

if TYPE_CHECKING:
    from retrieval_attn.llm import LLM


def search_with_bar(llm: "LLM", ids: list[int], budget: int | None, notes: Console) -> SearchedPatterns:
    """`search_patterns`, with a bar on `notes`."""
    # What is wrong is said before a bar is drawn.
    budget, ids = choose_budget(len(ids), budget), llm.encode(ids)
    with Progress(*Progress.get_default_columns(), console=notes) as bar:
        task = bar.add_task("trying patterns", total=None)
        return search_patterns(
            llm, ids, budget=budget, on_progress=lambda p: bar.update(task, completed=p.done, total=p.total)
        )


def as_table(found: SearchedPatterns) -> Table:
    """How many heads chose which pattern, and what that does to their outputs."""
    table = Table("pattern", *(Column(name, justify="right") for name in ("heads", "median error", "worst")))
    best = [tried for layer in found.best for tried in layer]
    for kind in ("a_shape", "vertical_slash", "block_sparse", "all"):
        errors = [tried.error for tried in best if kind in (tried.pattern.kind, "all")]
        if errors:
            table.add_row(kind, str(len(errors)), f"{100 * median(errors):.1f} %", f"{100 * max(errors):.1f} %")
    return table
