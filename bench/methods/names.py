"""The names of methods. Cheap to import."""

from retrieval_attn.config import INDEX_KINDS

OURS = (*INDEX_KINDS, "hnsw")
STOCK = ("full", "folded", "streaming", "offloaded", "quantized")
METHODS = (*STOCK, *OURS)
