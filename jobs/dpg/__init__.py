"""DPG-Bench: all of it, and its parts: question file, answers, scores, grids for the official script."""
