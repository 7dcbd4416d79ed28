"""Looking into a model: which neurons, layers and head outputs matter to which task. Measures; changes nothing."""
