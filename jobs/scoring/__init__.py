"""Benchmarks: the runs of their arms, questions about images, who answers them, scores, and arms that are compared."""
