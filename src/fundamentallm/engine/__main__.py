"""The entry point `python -m fundamentallm.engine`, the same as `python -m fundamentallm`."""

from fundamentallm.engine.cli import console

if __name__ == "__main__":
    console()
