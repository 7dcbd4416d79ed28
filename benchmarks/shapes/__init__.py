"""The shapes world: flat scenes that can be described, drawn and checked by program.

`scenes` is what there is, `captions` what is said and asked of it, `render` what it looks like; `oracle` says what a
picture shows, and `bench` makes a benchmark of it, in DPG-Bench's format.
"""
