"""Parametrizations: how initialization, learning rate and decay change with size."""
