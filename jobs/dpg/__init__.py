"""DPG-Bench: its question file, and how answers become scores."""
