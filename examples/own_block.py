"""A block of your own: a feed-forward gated by GELU, without touching the package.

    python examples/own_block.py
    PYTHONPATH=examples fundamentallm run train \\
        --plugins own_block model.feedforward=geglu

What to learn: one decorated module. Widths, biases and dropout come from the model's
configuration; any other parameter of the constructor is an option of the YAML. Norms and positions
are added in the same way.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.models.layers.feedforward import FEEDFORWARDS


@FEEDFORWARDS.register("geglu")
class GEGLU(nn.Module):
    """(gelu(x W) * (x V)) U (Shazeer 2020, equation 6).

    Args:
        width: D, supplied by the program.
        hidden_width: supplied by the program.
        bias: supplied by the program.
    """

    def __init__(self, width: int, hidden_width: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden_width, bias=bias)
        self.up = nn.Linear(width, hidden_width, bias=bias)
        # By this name the initialisation knows what writes into the residual stream.
        self.output = nn.Linear(hidden_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.output(F.gelu(self.gate(x)) * self.up(x))


def main() -> None:
    """Train a tiny model with it."""
    from fundamentallm.testing import tiny_loaders, tiny_model
    from fundamentallm.training.optimizers import OptimizerBuilder
    from fundamentallm.training.trainer import Trainer

    train_loader, val_loader = tiny_loaders()
    model = tiny_model(feedforward="geglu")
    optimizer = OptimizerBuilder.build("adamw", model, lr=1e-2)
    history = Trainer(model, train_loader, val_loader, optimizer, device="cpu").train(num_epochs=3)
    print(model.blocks[0])
    print(f"validation loss {history.val_loss[0]:.3f} -> {history.val_loss[-1]:.3f}")


if __name__ == "__main__":
    main()
