"""Proxy models: the decoder of the small-scale-proxies recipe, and an MLP and a CNN for checks."""
