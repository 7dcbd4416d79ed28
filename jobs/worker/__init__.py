"""A worker's side of a run: its model, and what becomes of a shard in its hands."""
