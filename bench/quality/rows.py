"""The fields of a row, which is one answer. Cheap to import."""

# Fields that a second run repeats to the byte, and those that it measures anew.
SCORE_FIELDS = (
    "task", "context", "example", "method", "mode", "turn", "part", "depth", "prompt_tokens", "answer", "refs", "score",
    "status", "reason",
)  # fmt: skip
COST_FIELDS = (
    "ttft_ms", "read_ms", "build_ms", "tpot_ms", "visited_pct", "kv_bytes", "device_kv_bytes", "index_bytes",
    "rss_bytes", "peak_device_bytes",
)  # fmt: skip
ROW_FIELDS = SCORE_FIELDS + COST_FIELDS
