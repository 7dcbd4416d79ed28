"""The commands: each parses, calls what is on the floors below, and prints."""
