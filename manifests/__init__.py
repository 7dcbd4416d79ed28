"""Prompts in Parquet: the schema, building and checking a manifest, cutting it into shards."""

from pathlib import Path

DEMO = Path(__file__).with_name("demo.parquet")  # a few dozen prompts, to try things with
PARQUET = (".parquet", ".pq")  # how the names of Parquet files end
