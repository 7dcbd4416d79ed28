"""A run's folder as readers and writers of it agree: its keys, its records, its payload formats, and reading them."""
