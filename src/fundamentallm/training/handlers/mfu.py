"""The share of the hardware's peak that training uses."""

from __future__ import annotations

import logging
import math
from typing import Annotated

from pydantic import Field

from fundamentallm.compute.peak import device_peak
from fundamentallm.config.base import Positive
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS
from fundamentallm.training.loop import TrainingLoop

logger = logging.getLogger(__name__)


@HANDLERS.register("mfu")
class ModelFlopsUtilization:
    """Observes: writes `train/mfu`, the model's FLOPs a second as a share of the devices' peak.

    The model's FLOPs are those of its forward and backward pass (`Estimate.flops_per_token`, after
    Chowdhery et al. 2022, appendix B); what gradient checkpointing computes again is not counted.
    Every token that is computed counts, one with a masked target and padding too.
    It reads `train/tokens_per_second` of the handler `throughput`, and is NaN without it.

    Args:
        peak_tflops: peak rate of one device, in 10^12 FLOP/s; None: the data sheet's for a GPU
            known by name, else the rate of matrix products measured when the run starts.
    """

    def __init__(
        self, peak_tflops: Annotated[Positive | None, Field(examples=[312.0])] = None
    ) -> None:
        if peak_tflops is not None and not 0 < peak_tflops < math.inf:
            raise ValueError(f"peak_tflops must be a number above 0, got {peak_tflops}")
        self.peak_tflops = peak_tflops
        self.flops_per_token = math.nan
        self.peak = math.nan

    def attach(self, trainer: TrainingLoop) -> None:
        """Count at FLLM_RUN_STARTED; write at FLLM_METRICS_MEASURED."""
        trainer.add_event_handler(TrainingEvents.FLLM_RUN_STARTED, self.prepare)
        trainer.add_event_handler(TrainingEvents.FLLM_METRICS_MEASURED, self.update)

    def prepare(self, trainer: TrainingLoop) -> None:
        """Count a token's FLOPs and find the devices' peak in FLOP/s."""
        if not trainer.has_role("throughput"):
            logger.warning("mfu is NaN: it needs the handler throughput, which is switched off")
        # The attention of a model that does not describe it is unknown.
        known = getattr(trainer.model, "flops_per_token", None)
        num_parameters = sum(p.numel() for p in trainer.model.parameters())
        self.flops_per_token = float(6 * num_parameters if known is None else known)
        if self.peak_tflops is not None:
            peak = self.peak_tflops * 1e12
        else:
            peak = device_peak(trainer.device, trainer.precision.dtype)
        self.peak = peak * trainer.ranks.world_size

    def update(self, trainer: TrainingLoop) -> None:
        """Write the share."""
        metrics = trainer.state.metrics
        rate = metrics.get("train/tokens_per_second", math.nan)
        metrics["train/mfu"] = rate * self.flops_per_token / self.peak
