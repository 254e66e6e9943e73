"""Matrix-free algorithms: they know vectors and operators, not networks."""
