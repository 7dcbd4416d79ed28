"""The small model that ships with the package: a checkpoint folder."""
