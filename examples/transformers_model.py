"""A model of `transformers`, passed as it is, with a DataLoader and a collator from there.

    pip install -c constraints.txt -e '.[huggingface]'
    python examples/transformers_model.py

What to learn: the batch has `labels` that equal `input_ids`, as the collators there make it; the
shift by one token happens once, here. `attention_mask` goes to the model. The run is stopped after
its first epoch and resumed by another trainer: the weights equal those of an uninterrupted run to
the last bit. Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

from fundamentallm.config import TrainingConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.training.trainer import Trainer

TEXT = (Path(__file__).parent / "data" / "tiny.txt").read_text(encoding="utf-8")
LENGTH = 64


def build_trainer() -> tuple[Trainer, CharacterTokenizer]:
    """Return a trainer of a fresh model; equal calls give equal weights."""
    tokenizer = CharacterTokenizer.from_text(TEXT)
    ids = torch.from_numpy(tokenizer.encode(TEXT)).long().unfold(0, LENGTH, LENGTH)
    rows = [{"input_ids": row, "attention_mask": row >= 0, "labels": row} for row in ids]
    loader = DataLoader(rows[:-16], batch_size=8, shuffle=True, collate_fn=default_data_collator)
    val_loader = DataLoader(rows[-16:], batch_size=8, collate_fn=default_data_collator)

    torch.manual_seed(0)
    size = {"vocab_size": tokenizer.vocab_size, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(
        GPT2Config(**size, n_positions=LENGTH, bos_token_id=None, eos_token_id=None)
    )
    config = TrainingConfig(learning_rate=3e-3, device="cpu")
    return Trainer(model, loader, val_loader, device="cpu", config=config), tokenizer


def main() -> None:
    """Train without a stop and with one; compare."""
    with tempfile.TemporaryDirectory() as folder:
        straight, tokenizer = build_trainer()
        history = straight.train(num_epochs=2, checkpoint_dir=Path(folder) / "straight")

        stopped, _ = build_trainer()
        stopped.train(num_epochs=1, checkpoint_dir=Path(folder) / "stopped")
        resumed, _ = build_trainer()
        resumed.resume(Path(folder) / "stopped" / f"step-{stopped.state.iteration:08d}")
        resumed.train(num_epochs=2)

    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    print("weights equal, bit for bit:", all(torch.equal(one, other) for one, other in pairs))
    print(f"validation loss {history.val_loss[0]:.3f} -> {history.val_loss[-1]:.3f}")
    prompt = torch.from_numpy(tokenizer.encode("The ")).long()[None]
    written = straight.model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    print(repr(tokenizer.decode(written[0])))


if __name__ == "__main__":
    main()
