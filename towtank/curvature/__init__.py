"""Curvature of a problem as operators, and the measurements made of them."""
