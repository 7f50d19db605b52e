"""A model of another kind, a recurrent one, without touching the package.

    python examples/own_model.py
    PYTHONPATH=examples fundamentallm run train \\
        --plugins own_model 'model={family: gru, hidden_size: 192}'
    PYTHONPATH=examples fundamentallm generate runs/train --plugins own_model

What to learn: one decorated module from token ids to logits. `vocab_size` comes from the program,
every other parameter is an option of the YAML, checked against its annotation. Training, resuming,
evaluation, generation and `verify` need no more; `fundamentallm.models.families` lists what a model
may offer besides. A checkpoint never imports code: later commands name the plugin again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fundamentallm.models.families import MODELS


@MODELS.register("gru")
class GRULanguageModel(nn.Module):
    """Gated recurrent layers over the tokens (Cho et al. 2014, section 2.3).

    It keeps no positions, so a text may be of any length.

    Args:
        vocab_size: V, supplied by the program.
        hidden_size: width D of the embedding and of each layer.
        num_layers: number of layers.
        dropout: share of the activations between layers that is set to zero in training.
    """

    def __init__(
        self, vocab_size: int, *, hidden_size: int = 128, num_layers: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if hidden_size < 1 or num_layers < 1:
            raise ValueError("hidden_size and num_layers must be at least 1")
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.GRU(
            hidden_size, hidden_size, num_layers, batch_first=True, dropout=dropout
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, *, return_hidden: bool = False) -> Tensor:
        """Return logits (B, T, V) of ids (B, T), or hidden states (B, T, D)."""
        states, _ = self.layers(self.embedding(input_ids))
        hidden: Tensor = self.norm(states)
        return hidden if return_hidden else self.logits_from_hidden(hidden)

    def logits_from_hidden(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D); with it, any loss will do."""
        logits: Tensor = self.head(hidden)
        return logits


def main() -> None:
    """Train a tiny one."""
    from fundamentallm.testing import tiny_loaders
    from fundamentallm.training.optimizers import OptimizerBuilder
    from fundamentallm.training.trainer import Trainer

    torch.manual_seed(0)
    train_loader, val_loader = tiny_loaders()
    model = GRULanguageModel(11, hidden_size=32)
    optimizer = OptimizerBuilder.build("adamw", model, lr=1e-2)
    history = Trainer(model, train_loader, val_loader, optimizer, device="cpu").train(num_epochs=5)
    print(f"validation loss {history.val_loss[0]:.3f} -> {history.val_loss[-1]:.3f}")


if __name__ == "__main__":
    main()
