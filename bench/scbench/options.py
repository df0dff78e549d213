"""Names of SCBench's tasks. Cheap to import."""

from typing import Any


def names() -> list[str]:
    """Every task that is generated."""
    from retrieval_attn.bench.scbench.tasks import TASKS

    return list(TASKS)


def groups() -> dict[str, Any]:
    """Names for several tasks."""
    from retrieval_attn.bench.scbench.tasks import STRING_RETRIEVAL, TASKS

    return {"string": list(STRING_RETRIEVAL), "all": list(TASKS)}
