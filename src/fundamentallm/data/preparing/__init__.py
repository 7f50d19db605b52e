"""Text of any size to token files, streamed, once: what the `prepare` command does."""
