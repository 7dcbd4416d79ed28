"""What a run did, as numbers that merge."""
