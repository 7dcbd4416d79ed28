"""What a run leaves for people to read: report.html and the dataset card, from its statistics.

They can be written at any time, also while the run is going. Nothing here runs a model or changes what the run made.
"""
