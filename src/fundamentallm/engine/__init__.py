"""Commands: `python -m fundamentallm.engine run config.yaml`."""
