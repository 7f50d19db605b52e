"""Models of `transformers` in the trainer, with its tokenizer and collators; no download.

`tests/unit/test_calling.py` is the fast twin without the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fundamentallm.config import TrainingConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.data.tokenizer.tokenizer_json import tokenizer_json
from fundamentallm.errors import ConfigError, FundamentaLLMError
from fundamentallm.inference.generate import stream_text
from fundamentallm.training.handlers import Samples
from fundamentallm.training.optimizers import parameter_groups
from fundamentallm.training.trainer import Trainer

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]
KINDS = ("gpt2", "llama")
ALPHABET = "abcdefghij ."
TEXTS = ["abc abc.", "a", "jihgfedcba jihg", "cab cab cab cab.", "ab", "fade a cage."]


@pytest.fixture(scope="module")
def transformers() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("transformers")


def small(transformers: ModuleType, kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    shared = {"vocab_size": 16, "bos_token_id": None, "eos_token_id": None, **options}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            **{"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **shared}
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            **shared,
        )
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def tokenizer_of(transformers: ModuleType, side: str = "right") -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    import json

    text = json.dumps(tokenizer_json(CharacterTokenizer(ALPHABET)))
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(text), padding_side=side
    )
    made.add_special_tokens({"pad_token": "<pad>"})
    return made


def loader_of(
    transformers: ModuleType, batch_size: int = 3, side: str = "right", **options: Any
) -> DataLoader[Any]:
    """Return rows of different lengths, as `datasets` holds them, behind the usual collator."""
    tokenizer = tokenizer_of(transformers, side)
    rows = [dict(tokenizer(text)) for text in TEXTS]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return DataLoader(rows, batch_size=batch_size, collate_fn=collator, **options)


def one_step(model: nn.Module, batches: Any, accumulation_steps: int = 1) -> Trainer:
    trainer = Trainer(
        model,
        batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        device="cpu",
        config=TrainingConfig(
            max_grad_norm=None,
            total_steps=1,
            warmup_steps=0,
            accumulation_steps=accumulation_steps,
        ),
    )
    trainer.run()
    return trainer


def step_by_hand(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Return the parameters after one step of SGD on a loss."""
    loss.backward()  # type: ignore[no-untyped-call]
    return [p.detach() - 0.5 * p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_models_own_loss(
    kind: str, side: str, transformers: ModuleType
) -> None:
    options = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0} if kind == "gpt2" else {}
    loader = loader_of(transformers, side=side)
    batch = next(iter(loader))
    assert type(batch).__name__ == "BatchEncoding"
    assert bool((batch["labels"] == -100).any())
    reference = small(transformers, kind, **options)
    loss = reference(**batch).loss
    after = step_by_hand(reference, loss)

    model = small(transformers, kind, **options)
    trainer = one_step(model, [batch])

    assert trainer.state.output.loss == pytest.approx(loss.item(), rel=1e-6)
    assert trainer.state.output.num_tokens == int((batch["labels"][:, 1:] >= 0).sum())
    for parameter, expected in zip(model.parameters(), after, strict=True):
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_the_models_loss_over_all_its_tokens(
    kind: str, transformers: ModuleType
) -> None:
    model = small(transformers, kind).eval()
    loader = loader_of(transformers)
    counts = [int((batch["labels"][:, 1:] >= 0).sum()) for batch in loader]
    assert counts[0] != counts[1]
    with torch.no_grad():
        # What its own trainer passes, so that a window is one sum over its tokens.
        total = sum(
            float(model(**batch, num_items_in_batch=torch.tensor(sum(counts))).loss)
            for batch in loader
        )
    trainer = Trainer(model, loader, loader, device="cpu")
    assert trainer.validate()["val/loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_collator_is_resumed_bit_for_bit(
    kind: str, transformers: ModuleType, tmp_path: Path
) -> None:
    def trainer() -> Trainer:
        loader = loader_of(transformers, batch_size=2, shuffle=True)
        config = TrainingConfig(learning_rate=1e-2, checkpoint_steps=11, warmup_steps=2)
        return Trainer(
            small(transformers, kind),
            loader,
            loader_of(transformers, batch_size=2),
            device="cpu",
            config=config,
        )

    whole = trainer()
    history = whole.train(num_epochs=4, checkpoint_dir=tmp_path / "whole")
    assert history.val_loss[-1] < history.val_loss[0]
    resumed = trainer()
    resumed.resume(tmp_path / "whole" / "step-00000011")  # in the middle of an epoch
    resumed.train(num_epochs=4)
    assert resumed.state.iteration == whole.state.iteration == 12
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_its_own_generate(
    kind: str, transformers: ModuleType, tmp_path: Path
) -> None:
    model = small(transformers, kind, vocab_size=len(ALPHABET)).eval()
    tokenizer = CharacterTokenizer(ALPHABET)
    prompt = torch.tensor([tokenizer.encode("abc").tolist()])
    theirs = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    ours = "".join(stream_text(model, tokenizer, "abc", 20, temperature=0))
    assert ours == tokenizer.decode(theirs[0, 3:])
    # Longer than its positions: the context restarts.
    assert len("".join(stream_text(model, tokenizer, "abc", 60, temperature=0))) == 60
    trainer = Trainer(model, [(prompt, prompt)], [(prompt, prompt)], device="cpu")
    Samples(tokenizer, tmp_path, num_tokens=5, prompt="a").attach(trainer)
    trainer.train(num_epochs=1)
    assert (tmp_path / "samples.jsonl").exists()


def test_the_linear_layers_of_gpt2_decay(transformers: ModuleType) -> None:
    model = small(transformers, "gpt2")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {names[id(parameter)] for parameter in parameter_groups(model)[0]["params"]}
    assert decaying == {
        "transformer.wte.weight",  # tied to the head
        *(
            f"transformer.h.{layer}.{name}.weight"
            for layer in range(2)
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_recomputed_with_the_same_gradient(
    kind: str, transformers: ModuleType
) -> None:
    options = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0} if kind == "gpt2" else {}
    batch = next(iter(loader_of(transformers)))
    config = TrainingConfig(total_steps=1, warmup_steps=0, gradient_checkpointing=True)
    model = small(transformers, kind, **options)
    trainer = Trainer(
        model,
        [batch],
        None,
        torch.optim.SGD(model.parameters(), lr=0.5),
        device="cpu",
        config=config,
    )
    assert model.is_gradient_checkpointing
    trainer.run()
    plain = small(transformers, kind, **options)
    expected = Trainer(
        plain,
        [batch],
        None,
        torch.optim.SGD(plain.parameters(), lr=0.5),
        device="cpu",
        config=TrainingConfig(total_steps=1, warmup_steps=0),
    )
    expected.run()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "build",
    [
        lambda t: t.BertForMaskedLM(
            t.BertConfig(
                vocab_size=16,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
            )
        ),
        lambda t: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=16, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        ),
        lambda t: t.MixtralForCausalLM(
            t.MixtralConfig(
                vocab_size=16,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                output_router_logits=True,
                bos_token_id=None,
                eos_token_id=None,
            )
        ),
    ],
    ids=["masked", "encoder and decoder", "routers"],
)
def test_another_task_is_refused(build: Any, transformers: ModuleType) -> None:
    with pytest.raises(ConfigError):
        Trainer(build(transformers), loader_of(transformers), device="cpu")


def test_a_model_without_its_head_is_refused(transformers: ModuleType) -> None:
    model = small(transformers, "gpt2").transformer
    with pytest.raises(FundamentaLLMError, match="AutoModelForCausalLM"):
        one_step(model, loader_of(transformers))  # type: ignore[arg-type]
