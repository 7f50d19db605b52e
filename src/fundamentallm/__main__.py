"""The entry point `python -m fundamentallm`."""

from fundamentallm.engine.cli import console

if __name__ == "__main__":
    console()
