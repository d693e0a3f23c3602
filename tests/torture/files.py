"""Hostile files: fuzzed and mutated data, checkpoints, YAML, label lists and metrics."""
