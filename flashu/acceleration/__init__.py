"""FlashU: the plan of a run, a file a technique, and what both come to on one model."""
