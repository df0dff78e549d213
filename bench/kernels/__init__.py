"""Times of the kernels: prefill, sparse and dense, and those of decode."""
