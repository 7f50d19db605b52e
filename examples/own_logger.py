"""A logger of your own: metrics as rows of an SQLite database, without touching the package.

    python examples/own_logger.py
    PYTHONPATH=examples fundamentallm run train \\
        --plugins own_logger handlers.sqlite=true
    sqlite3 runs/train/metrics.sqlite "SELECT step, value FROM metrics WHERE name = 'val/loss'"

What to learn: `write` one record, `cut_back` when the run goes back. When that happens, on which
rank, and what becomes of an error (a warning, never the end of the run), `MetricsWriter` knows.
"""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from fundamentallm.training.handlers import HANDLERS, MetricsWriter, Record


@HANDLERS.register("sqlite")
class SQLiteLog(MetricsWriter):
    """Observes: writes `metrics.sqlite`, a row for each number."""

    target = "metrics.sqlite"

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / self.target

    def write(self, record: Record) -> None:
        """Add the rows of a record, all or none; NaN becomes NULL."""
        rows = [(record.step, record.kind, *number) for number in record.metrics.items()]
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS metrics (step, kind, name, value)")
            database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", rows)

    def cut_back(self, step: int, evaluation_pending: bool) -> None:
        """Delete the rows of steps that the run has not taken."""
        if self.path.exists():
            with closing(sqlite3.connect(self.path)) as database, database:
                database.execute("DELETE FROM metrics WHERE step > ?", (step,))
                if evaluation_pending:
                    database.execute("DELETE FROM metrics WHERE step = ? AND kind = 'val'", (step,))


def main() -> None:
    """Train a tiny model with it and ask for the best validation loss."""
    from fundamentallm.testing import tiny_loaders, tiny_model
    from fundamentallm.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as directory:
        log = SQLiteLog(Path(directory))
        Trainer(tiny_model(), *tiny_loaders(), device="cpu", handlers=[log]).train(num_epochs=5)
        with closing(sqlite3.connect(log.path)) as database:
            query = "SELECT min(value), step FROM metrics WHERE name = 'val/loss'"
            print(
                "best validation loss {:.3f} at step {}".format(*database.execute(query).fetchone())
            )


if __name__ == "__main__":
    main()
