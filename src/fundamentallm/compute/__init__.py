"""How a configuration computes on this machine."""
