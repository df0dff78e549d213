"""Benchmarks, one folder each: command, options, measure, format; `retrieval-attn bench` runs them."""
