"""Tasks to compare on. Cheap to import."""

from retrieval_attn.bench.ruler import options as ruler
from retrieval_attn.bench.scbench import options as scbench


def names() -> list[str]:
    """Tasks of all three benchmarks that need no file; of equal names RULER's comes first."""
    return list(dict.fromkeys(["needle", *(name for name in ruler.names() if name != "qa"), *scbench.names()]))
