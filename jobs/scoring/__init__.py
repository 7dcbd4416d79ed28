"""Benchmarks over finished runs: questions, folders, judges, scores, and the arms that are compared."""
