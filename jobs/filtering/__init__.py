"""Filtered copies of runs: `flashu filter`. A run's metadata says which images stay; their shards are written anew."""
