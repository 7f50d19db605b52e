"""Text to batches: tokenizers, sources, datasets and loaders."""
