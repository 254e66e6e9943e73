"""The training loop, ensembles, proxy models and built-in data."""
