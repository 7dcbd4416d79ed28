"""Running sharded work on Ray: the shard queue, the worker pool, storage, metrics."""
