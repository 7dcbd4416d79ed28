"""Prompts in Parquet: the schema, building and checking a manifest, cutting it into shards."""
