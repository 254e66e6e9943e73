"""Studies: what to run, the runs themselves, and their records on disk."""
