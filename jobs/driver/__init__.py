"""The head node's side of a run: prepared, driven to its end, shown while it goes; on this machine or submitted."""
