"""The papers' benchmarks as lm-eval tasks: YAML, and the functions that shape their data."""
