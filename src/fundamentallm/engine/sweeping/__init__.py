"""Sweeps: which settings are tried, what is recorded of them, and the runs themselves."""
