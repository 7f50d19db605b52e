"""The losses of a learning-rate range test: smoothed, drawn, and what they suggest."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fundamentallm.errors import MachineError

ROWS, WIDTH = 24, 48  # of the drawing in text
FALLEN = 0.75  # share of the whole fall of the loss, at which the rate is taken


@dataclass(frozen=True)
class Curve:
    """Losses at rising rates.

    Attributes:
        rates: one for each step.
        losses: in nats per token, before the step of that rate.
    """

    rates: Sequence[float]
    losses: Sequence[float]

    def smoothed(self) -> list[float]:
        """Return the mean of each loss and its neighbours, a fortieth of the curve on both sides.

        A running mean would lag behind, and the lag would move the suggestion.
        """
        reach = max(1, len(self.losses) // 40)
        windows = [
            self.losses[max(0, place - reach) : place + reach + 1]
            for place in range(len(self.losses))
        ]
        return [math.fsum(window) / len(window) for window in windows]

    def suggestion(self) -> float | None:
        """Return the rate at which the loss has made most of its fall; None if it does not fall.

        The lowest loss lies somewhere on a flat floor, near divergence, and says less
        (docs/lab.md). The first tenth of the rates is too small to teach anything: it tells the
        loss to begin with and how the losses scatter, and a fall is at least twice that.
        """
        first = self.losses[: len(self.losses) // 10]
        if len(first) < 2:
            return None
        smooth, before = self.smoothed(), statistics.fmean(first)
        fall = before - min(smooth)
        if fall <= 2 * statistics.pstdev(first):
            return None
        place = next(n for n, loss in enumerate(smooth) if loss <= before - FALLEN * fall)
        return self.rates[place]

    def text(self, suggestion: float | None) -> str:
        """Draw the smoothed curve as rows of rate, loss and a bar; the suggestion is marked."""
        smooth = self.smoothed()
        if not smooth:
            return "(no step)"
        stride = max(1, math.ceil(len(smooth) / ROWS))
        # What has diverged would flatten the rest.
        low, high = min(smooth), smooth[0] + 0.2 * (smooth[0] - min(smooth))
        rows, marked = [f"{'rate':>8} {'loss':>8}"], suggestion is None
        for place in range(0, len(smooth), stride):
            loss = smooth[place]
            share = min(1.0, max(0.0, (loss - low) / (high - low))) if high > low else 0.0
            row = f"{self.rates[place]:8.1e} {loss:8.4f} {'#' * (1 + round(share * (WIDTH - 1)))}"
            following = self.rates[min(place + stride, len(smooth)) - 1]
            if not marked and suggestion is not None and suggestion <= following:
                row, marked = f"{row}  <- {suggestion:.1e}", True
            rows.append(row)
        return "\n".join(rows)

    def png(self, suggestion: float | None) -> bytes:
        """Draw the losses and the smoothed curve as a PNG.

        Raises:
            MachineError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MachineError(
                "matplotlib is not installed, so there is no picture of the curve",
                fix="pip install matplotlib",
            ) from error
        smooth = self.smoothed()
        figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="0.75", linewidth=1, label="one step")
        axes.plot(self.rates, smooth, color="tab:blue", label="smoothed")
        if suggestion is not None:
            axes.axvline(
                suggestion, color="tab:red", linestyle="--", label=f"suggestion {suggestion:.1e}"
            )
        low, high = min(smooth), smooth[0]
        axes.set(
            xscale="log",
            xlabel="learning rate",
            ylabel="loss (nats per token)",
            ylim=(low - 0.1 * (high - low), high + 0.3 * (high - low) + 1e-3),
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()
