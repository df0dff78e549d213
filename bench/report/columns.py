"""The columns of a report's tables, by kind of benchmark: heading, key of the row, how a number is written.

"{}" is text, set to the left; "{:>}" is text that was a number, set to the right; "MiB" divides bytes.
"""

Columns = list[tuple[str, str, str]]

STATUS: Columns = [("status", "status", "{}"), ("reason", "reason", "{}")]

_WHO: Columns = [("context", "context", "{:,}"), ("method", "method", "{}")]
_TIMES: Columns = [
    ("ms", "total_ms", "{:,.3f}"),
    ("p20", "total_p20_ms", "{:,.3f}"),
    ("p80", "total_p80_ms", "{:,.3f}"),
]

LATENCY: Columns = [
    *_WHO,
    *_TIMES,
    ("TTFT ms", "ttft_ms", "{:,.0f}"),
    ("prefill ms", "prefill_ms", "{:,.0f}"),
    ("p50", "itl_p50_ms", "{:.2f}"),
    ("p90", "itl_p90_ms", "{:.2f}"),
    ("p99", "itl_p99_ms", "{:.2f}"),
    ("near", "near_ms", "{:.3f}"),
    ("search", "search_ms", "{:.3f}"),
    ("gather", "gather_ms", "{:.3f}"),
    ("merge", "merge_ms", "{:.3f}"),
    ("rest", "rest_ms", "{:.3f}"),
    ("x full", "speedup_vs_full", "{:.2f}"),
    ("x folded", "speedup_vs_folded", "{:.2f}"),
    ("visited %", "visited_pct", "{:.2f}"),
    ("recall", "recall", "{:.3f}"),
    ("rel. error", "rel_error", "{:.1e}"),
    ("GB/s", "gb_per_s", "{:.1f}"),
    ("build s", "build_s", "{:.1f}"),
    ("index MiB", "index_bytes", "MiB"),
    ("KV MiB", "kv_bytes", "MiB"),
    ("peak RSS MiB", "peak_rss_bytes", "MiB"),
    ("peak device MiB", "peak_device_bytes", "MiB"),
    *STATUS,
]

_SEARCHED: Columns = [
    ("source", "source", "{}"),
    ("keys", "context", "{:,}"),
    ("seed", "seed", "{:.0f}"),
    ("method", "method", "{}"),
]
AT_RECALL: Columns = [
    *_SEARCHED,
    ("search ms", "search_ms", "{:,.3f}"),
    ("visited %", "visited_pct", "{:.2f}"),
    ("MiB read", "bytes_read", "MiB"),
    ("", "remark", "{}"),
]
RECALL: Columns = [
    *_SEARCHED,
    ("effort", "effort", "{:,}"),
    ("recall", "recall", "{:.3f}"),
    ("worst head", "worst_head_recall", "{:.3f}"),
    ("mass", "mass", "{:.3f}"),
    ("visited %", "visited_pct", "{:.2f}"),
    ("MiB read", "bytes_read", "MiB"),
    ("search µs", "search_us", "{:,.0f}"),
    ("p20", "search_p20_us", "{:,.0f}"),
    ("p80", "search_p80_us", "{:,.0f}"),
    *((f"error {name}", f"err_{name}", "{:.4f}") for name in ("topk", "lift", "tail", "topk-group", "tail-group")),
    *((f"step µs {name}", f"step_{name}_us", "{:,.0f}") for name in ("topk", "lift", "tail")),
    ("build s", "build_s", "{:.1f}"),
    ("index MiB", "index_bytes", "MiB"),
    ("% of KV", "index_pct", "{:.1f}"),
    *STATUS,
]

KERNELS: Columns = [
    ("part", "part", "{}"),
    *_WHO,
    *_TIMES,
    ("x sdpa", "speedup_vs_sdpa", "{:.2f}"),
    ("x best dense", "speedup_vs_best_dense", "{:.2f}"),
    ("TFLOP/s", "tflop_per_s", "{:.3f}"),
    ("of peak", "peak_share", "{:.3f}"),
    ("GB/s", "gb_per_s", "{:.2f}"),
    ("density", "density", "{:.4f}"),
    ("mass", "mass", "{:.4f}"),
    ("rel. error", "rel_error", "{:.1e}"),
    *STATUS,
]

_SESSION: Columns = [("context", "context", "{}"), ("index", "index", "{}")]
PEAKS: Columns = [
    *_SESSION,
    ("phase", "phase", "{}"),
    ("planned MiB", "planned_host", "MiB"),
    ("measured MiB", "measured_host", "MiB"),
    ("ratio", "host_ratio", "{:.3f}"),
    ("device planned MiB", "planned_device", "MiB"),
    ("device measured MiB", "measured_device", "MiB"),
    ("device ratio", "device_ratio", "{:.3f}"),
]
MEMORY: Columns = [
    *_SESSION,
    ("tokens", "tokens", "{:,}"),
    ("TTFT s", "ttft_s", "{:.2f}"),
    ("prefill s", "prefill_s", "{:.2f}"),
    ("build s", "build_s", "{:.2f}"),
    ("second question s", "second_question_s", "{:.3f}"),
    ("save s", "save_s", "{:.2f}"),
    ("restore s", "restore_s", "{:.2f}"),
    ("first token after restore s", "first_token_after_restore_s", "{:.2f}"),
    ("KV MiB", "kv_bytes", "MiB"),
    ("index MiB", "index_bytes", "MiB"),
    ("answers", "answers", "{:,}"),
    ("right", "answers_right", "{:,}"),
    *STATUS,
]

LONG: Columns = [
    ("answer, tokens", "new_tokens", "{:,}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("ms/token p50", "median_ms", "{:.2f}"),
    ("p99", "p99_ms", "{:.2f}"),
    ("worst", "worst_ms", "{:.1f}"),
    ("process MB", "rss_mb", "{:.1f}"),
    ("KV MB", "kv_mb", "{:.1f}"),
    ("index MB", "index_mb", "{:.1f}"),
    ("indexed of far", "indexed", "{:.4f}"),
]

_SPENT: Columns = [
    ("TTFT ms", "ttft_ms", "{:,.1f}"),
    ("read ms", "read_ms", "{:,.1f}"),
    ("build ms", "build_ms", "{:,.1f}"),
    ("ms/token", "tpot_ms", "{:,.2f}"),
    ("visited %", "visited_pct", "{:.2f}"),
    ("KV MiB", "kv_bytes", "MiB"),
    ("device KV MiB", "device_kv_bytes", "MiB"),
    ("index MiB", "index_bytes", "MiB"),
    ("RSS MiB", "rss_bytes", "MiB"),
    ("peak device MiB", "peak_device_bytes", "MiB"),
]
ASKED: Columns = [
    ("task", "task", "{}"),
    ("context", "context", "{:,}"),
    ("mode", "mode", "{}"),
    ("turn", "turn", "{:.0f}"),
    ("answers", "answers", "{:>}"),
]
COSTS: Columns = [("context", "context", "{:,}"), ("mode", "mode", "{}"), ("method", "method", "{}"), *_SPENT]
ANSWERS: Columns = [
    ("task", "task", "{}"),
    ("context", "context", "{:,}"),
    ("example", "example", "{}"),
    ("method", "method", "{}"),
    ("mode", "mode", "{}"),
    ("turn", "turn", "{:.0f}"),
    ("depth", "depth", "{:.3f}"),
    ("prompt tokens", "prompt_tokens", "{:,}"),
    ("answer", "answer", "{}"),
    ("wanted", "refs", "{}"),
    ("score", "score", "{:.3f}"),
    *STATUS,
    *_SPENT,
]

PPL: Columns = [
    *_WHO,
    ("tokens", "tokens", "{:,}"),
    ("perplexity", "ppl", "{:.3f}"),
    ("agreement", "agreement", "{:.4f}"),
    ("KL, nats", "kl", "{:.5f}"),
    ("ms/token", "tpot_ms", "{:,.2f}"),
    ("visited %", "visited_pct", "{:.2f}"),
    *STATUS,
]

HEADS: Columns = [
    *_WHO,
    ("heads", "heads", "{:,}"),
    ("mean error", "mean_error", "{:.4f}"),
    ("worst error", "worst_error", "{:.4f}"),
    ("mean mass", "mean_mass", "{:.4f}"),
    ("mean recall", "mean_recall", "{:.4f}"),
    ("mean planted", "mean_planted", "{:.4f}"),
]
FIDELITY: Columns = [
    *_WHO,
    ("layer", "layer", "{:.0f}"),
    ("head", "head", "{:.0f}"),
    ("error", "error", "{:.4f}"),
    ("mass", "mass", "{:.4f}"),
    ("recall", "recall", "{:.4f}"),
    ("planted", "planted", "{:.4f}"),
    *STATUS,
]

# The columns that read a row as it is written: what the checks of a file look at.
ROWS: dict[str, Columns] = {
    "latency": LATENCY,
    "recall": RECALL,
    "compare": ANSWERS,
    "needle": ANSWERS,
    "ruler": ANSWERS,
    "scbench": ANSWERS,
    "ppl": PPL,
    "fidelity": FIDELITY,
    "memory": MEMORY,
    "long": LONG,
    "kernels": KERNELS,
}
