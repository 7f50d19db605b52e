"""Find the fastest settings on a machine."""
