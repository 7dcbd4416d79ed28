"""What a person runs: the `flashu` command and, behind it, the jobs."""
