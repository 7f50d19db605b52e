"""Commands: `fundamentallm run config.yaml`."""
