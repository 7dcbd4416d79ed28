"""The commands: each parses, calls one function of the rooms below, and prints."""
