"""The table of `bench long`, and what became of speed and memory."""

from retrieval_attn.bench.shared.report import Columns, Row

COLUMNS: Columns = [
    ("answer", "new_tokens", "{:,}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("ms/token p50", "median_ms", "{:.2f}"),
    ("p99", "p99_ms", "{:.2f}"),
    ("worst", "worst_ms", "{:.1f}"),
    ("process MB", "rss_mb", "{:.1f}"),
    ("KV MB", "kv_mb", "{:.1f}"),
    ("index MB", "index_mb", "{:.1f}"),
    ("indexed of far", "indexed", "{:.4f}"),
]


def verdict(rows: list[Row]) -> str:
    """What became of speed and memory between the first row and the last."""
    if len(rows) < 2:
        return "one row says nothing about growth; ask for more tokens, or for shorter rows"
    first, last = rows[0], rows[-1]
    slower = 100 * (1 - last["tokens_per_s"] / first["tokens_per_s"])
    grown = {name: last[f"{name}_mb"] - first[f"{name}_mb"] for name in ("rss", "kv", "index")}
    return (
        f"tokens per second fell by {slower:.1f} % from the first row to the last; the process grew by "
        f"{grown['rss']:.1f} MB, keys and values by {grown['kv']:.1f} MB, indexes by {grown['index']:.1f} MB"
    )
