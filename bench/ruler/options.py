"""Names of RULER's tasks. Cheap to import."""

from typing import Any


def names() -> list[str]:
    """Every task."""
    from retrieval_attn.bench.ruler.tasks import TASKS

    return [*TASKS, "qa"]


def groups() -> dict[str, Any]:
    """Names for several tasks."""
    from retrieval_attn.bench.ruler.tasks import RETRIEVAL, TASKS

    return {"retrieval": list(RETRIEVAL), "all": list(TASKS)}
