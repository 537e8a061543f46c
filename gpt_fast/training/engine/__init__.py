"""One update of a model's weights, on one process or on many."""
