"""Benchmarks' own prompt files as manifests."""
