"""Computes: decoder-only transformers from named parts, and text from them."""
