"""The door `python -m fundamentallm.engine`."""

import sys

from fundamentallm.engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
