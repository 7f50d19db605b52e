"""The settings that a machine runs fastest."""
