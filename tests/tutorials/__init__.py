"""The tutorials, shortened: each shows what it says."""
