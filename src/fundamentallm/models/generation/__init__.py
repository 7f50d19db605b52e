"""One token after another: batches, keys and values, sampling."""
