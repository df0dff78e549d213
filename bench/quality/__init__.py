"""What the benchmarks that judge answers share: needle, ruler, scbench, compare, and in part ppl and fidelity."""
