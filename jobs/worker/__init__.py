"""A worker's side of a run: what it makes images with, and what becomes of a shard in its hands."""
