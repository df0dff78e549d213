"""What many benchmarks share: facts, the machine, options, failures, rows and tables, pictures, bars."""
