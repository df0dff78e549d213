"""The columns of a report's tables, by kind of benchmark: which keys of a row they show, and how."""

from retrieval_attn.bench.recall.estimators import ESTIMATORS
from retrieval_attn.bench.shared.report import Columns

# The heading of a key and how its values are written, the same in every table. "{}" is text, set to the left;
# "{:>}" is text that was a number, set to the right; "MiB" divides bytes.
_KEYS = {
    "context": ("context", "{:,}"),
    "method": ("method", "{}"),
    "index": ("index", "{}"),
    "source": ("source", "{}"),
    "seed": ("seed", "{:.0f}"),
    "effort": ("effort", "{:,}"),
    "part": ("part", "{}"),
    "phase": ("phase", "{}"),
    "task": ("task", "{}"),
    "example": ("example", "{}"),
    "mode": ("mode", "{}"),
    "turn": ("turn", "{:.0f}"),
    "depth": ("depth", "{:.3f}"),
    "layer": ("layer", "{:.0f}"),
    "head": ("head", "{:.0f}"),
    "heads": ("heads", "{:,}"),
    "status": ("status", "{}"),
    "reason": ("reason", "{}"),
    "remark": ("", "{}"),
    "tokens": ("tokens", "{:,}"),
    "prompt_tokens": ("prompt, tokens", "{:,}"),
    "new_tokens": ("answer, tokens", "{:,}"),
    "answer": ("answer", "{}"),
    "refs": ("wanted", "{}"),
    "score": ("score", "{:.3f}"),
    "answers": ("answers", "{:>}"),
    "answers_right": ("right", "{:,}"),
    "total_ms": ("ms", "{:,.3f}"),
    "total_p20_ms": ("p20 ms", "{:,.3f}"),
    "total_p80_ms": ("p80 ms", "{:,.3f}"),
    "near_ms": ("near ms", "{:.3f}"),
    "search_ms": ("search ms", "{:,.3f}"),
    "gather_ms": ("gather ms", "{:.3f}"),
    "merge_ms": ("merge ms", "{:.3f}"),
    "rest_ms": ("rest ms", "{:.3f}"),
    "ttft_ms": ("first token ms", "{:,.1f}"),
    "prefill_ms": ("prefill ms", "{:,.1f}"),
    "read_ms": ("read ms", "{:,.1f}"),
    "build_ms": ("build ms", "{:,.1f}"),
    "tpot_ms": ("ms per token", "{:,.2f}"),
    "itl_p50_ms": ("token p50 ms", "{:.2f}"),
    "itl_p90_ms": ("token p90 ms", "{:.2f}"),
    "itl_p99_ms": ("token p99 ms", "{:.2f}"),
    "median_ms": ("token p50 ms", "{:.2f}"),
    "p99_ms": ("token p99 ms", "{:.2f}"),
    "worst_ms": ("worst token ms", "{:.1f}"),
    "search_us": ("search µs", "{:,.0f}"),
    "search_p20_us": ("p20 µs", "{:,.0f}"),
    "search_p80_us": ("p80 µs", "{:,.0f}"),
    "ttft_s": ("first token s", "{:.2f}"),
    "prefill_s": ("prefill s", "{:.2f}"),
    "build_s": ("build s", "{:.2f}"),
    "second_question_s": ("second question s", "{:.3f}"),
    "save_s": ("save s", "{:.2f}"),
    "restore_s": ("restore s", "{:.2f}"),
    "first_token_after_restore_s": ("first token after restore s", "{:.2f}"),
    "speedup_vs_full": ("x full", "{:.2f}"),
    "speedup_vs_folded": ("x folded", "{:.2f}"),
    "speedup_vs_sdpa": ("x sdpa", "{:.2f}"),
    "speedup_vs_best_dense": ("x best dense", "{:.2f}"),
    "tokens_per_s": ("tokens/s", "{:.1f}"),
    "tflop_per_s": ("TFLOP/s", "{:.3f}"),
    "peak_share": ("of peak", "{:.3f}"),
    "gb_per_s": ("GB/s", "{:.2f}"),
    "visited_pct": ("visited %", "{:.2f}"),
    "recall": ("recall", "{:.4f}"),
    "worst_head_recall": ("recall of worst head", "{:.3f}"),
    "mass": ("mass", "{:.4f}"),
    "planted": ("planted", "{:.4f}"),
    "density": ("density", "{:.4f}"),
    "error": ("error", "{:.4f}"),
    "rel_error": ("relative error", "{:.1e}"),
    "ppl": ("perplexity", "{:.3f}"),
    "agreement": ("agreement", "{:.4f}"),
    "kl": ("KL, nats", "{:.5f}"),
    "indexed": ("indexed of far", "{:.4f}"),
    "bytes_read": ("MiB read", "MiB"),
    "index_bytes": ("index MiB", "MiB"),
    "index_pct": ("index, % of KV", "{:.1f}"),
    "kv_bytes": ("KV MiB", "MiB"),
    "device_kv_bytes": ("device KV MiB", "MiB"),
    "rss_bytes": ("peak RSS MiB", "MiB"),
    "peak_rss_bytes": ("peak RSS MiB", "MiB"),
    "peak_device_bytes": ("peak device MiB", "MiB"),
    "rss_mb": ("process MB", "{:.1f}"),
    "kv_mb": ("KV MB", "{:.1f}"),
    "index_mb": ("index MB", "{:.1f}"),
    "planned_host": ("planned MiB", "MiB"),
    "measured_host": ("measured MiB", "MiB"),
    "host_ratio": ("ratio", "{:.3f}"),
    "planned_device": ("device planned MiB", "MiB"),
    "measured_device": ("device measured MiB", "MiB"),
    "device_ratio": ("device ratio", "{:.3f}"),
    **{f"err_{name}": (f"error {name}", "{:.4f}") for name in ESTIMATORS},
    **{f"step_{name}_us": (f"step {name} µs", "{:,.0f}") for name in ESTIMATORS},
    **{f"mean_{name}": (f"mean {name}", "{:.4f}") for name in ("error", "mass", "recall", "planted")},
    "worst_error": ("worst error", "{:.4f}"),
}


def columns(keys: str) -> Columns:
    """A column for each of these keys: its heading, the key, and how its values are written."""
    return [(_KEYS[key][0], key, _KEYS[key][1]) for key in keys.split()]


_WHO = "context method"
_TIMES = "total_ms total_p20_ms total_p80_ms"
_SPENT = "ttft_ms read_ms build_ms tpot_ms visited_pct kv_bytes device_kv_bytes index_bytes rss_bytes peak_device_bytes"
_ERRORS = " ".join([*(f"err_{name}" for name in ESTIMATORS), *(f"step_{name}_us" for name in ESTIMATORS)])

# Rows of memory name their context as it was asked for.
_SESSION = [("context", "context", "{}"), *columns("index")]

_ANSWERS = columns(
    f"task context example method mode turn depth prompt_tokens answer refs score status reason {_SPENT}"
)

# Columns of the rows as they are written: what the checks of a file look at.
ROWS: dict[str, Columns] = {
    "latency": columns(
        f"{_WHO} {_TIMES} ttft_ms prefill_ms itl_p50_ms itl_p90_ms itl_p99_ms near_ms search_ms gather_ms merge_ms "
        "rest_ms speedup_vs_full speedup_vs_folded visited_pct recall rel_error gb_per_s build_s index_bytes kv_bytes "
        "peak_rss_bytes peak_device_bytes status reason"
    ),
    "recall": columns(
        "source context seed method effort recall worst_head_recall mass visited_pct bytes_read search_us "
        f"search_p20_us search_p80_us {_ERRORS} build_s index_bytes index_pct status reason"
    ),
    **dict.fromkeys(("compare", "needle", "ruler", "scbench"), _ANSWERS),
    "ppl": columns(f"{_WHO} tokens ppl agreement kl tpot_ms visited_pct status reason"),
    "fidelity": columns(f"{_WHO} layer head error mass recall planted status reason"),
    "memory": _SESSION
    + columns(
        "tokens ttft_s prefill_s build_s second_question_s save_s restore_s first_token_after_restore_s kv_bytes "
        "index_bytes answers_right answers status reason"
    ),
    "long": columns("new_tokens tokens_per_s median_ms p99_ms worst_ms rss_mb kv_mb index_mb indexed"),
    "kernels": columns(
        f"part {_WHO} {_TIMES} speedup_vs_sdpa speedup_vs_best_dense tflop_per_s peak_share gb_per_s density mass "
        "rel_error status reason"
    ),
}

# Columns of what is summed up from rows.
AT_RECALL = columns("source context seed method search_ms visited_pct bytes_read remark")
PEAKS = _SESSION + columns("phase planned_host measured_host host_ratio planned_device measured_device device_ratio")
HEADS = columns(f"{_WHO} heads mean_error worst_error mean_mass mean_recall mean_planted")
ASKED = columns("task context mode turn answers")
COSTS = columns(f"context mode method {_SPENT}")
