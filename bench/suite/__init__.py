"""All benchmarks of quality in one run."""
