"""A decoder-only transformer.

- Pre-norm blocks, and one more normalization before the head.
- Normalization, positions and feed-forward are chosen by name: see the registries.
- Grouped-query attention where num_kv_heads is below num_heads.
- The head has no bias and may share its matrix with the token embedding.
- Optionally the embeddings are normalized, get a share of the one before, and are mixed in again at
  each block.
- Dropout on embeddings, attention weights and what each branch adds.

Shapes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fundamentallm.config.model import TRANSFORMER, TransformerConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.estimate import estimate
from fundamentallm.models.families import MODELS
from fundamentallm.models.generation.cache import CacheUse, KVCache
from fundamentallm.models.layers.attention import (
    Attend,
    document_attention,
    own_document,
    places_in_documents,
)
from fundamentallm.models.layers.components import (
    build_block,
    build_normalization,
    build_positions,
    check_components,
    follows_weight_type,
    required,
)
from fundamentallm.models.layers.initialization import initialize
from fundamentallm.models.layers.positions import Marks
from fundamentallm.models.layers.token_shift import TokenShift, one_before


def run_block(
    block: nn.Module, x: Tensor, marks: Marks, embedded: Tensor, attend: Attend | None = None
) -> Tensor:
    """Call a block as it is."""
    out: Tensor = block(x, marks, embedded, attend)
    return out


@MODELS.register(TRANSFORMER)
class Transformer(nn.Module):
    """A language model: token ids to the logits of each next token.

    The weights are drawn from torch's global generator, so `torch.manual_seed` decides them; see
    `fundamentallm.models.layers.initialization`. At the start the loss is near log(V).

    Args:
        config: the choices; `vocab_size` and `sequence_length` must be set.

    Attributes:
        config: as given.
        sequence_length: context length, the longest input in tokens.
        head: the last linear layer, D to V; `head.weight` is the token embedding's own parameter
            where the config ties them.
        run_block: how a block is called; set another function of the same form, such as a compiled
            one.
        gradient_checkpointing: set it to keep only the blocks' inputs in training and compute the
            rest again in the backward pass, dropout included: less memory, equal gradients.

    Raises:
        ConfigError: a size is missing, or a component's name or option is wrong.
    """

    check = staticmethod(check_components)
    estimate = staticmethod(estimate)
    can_follow_weight_type = staticmethod(follows_weight_type)
    uses_attention = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        vocab_size = required(config, "vocab_size")
        self.config = config
        self.sequence_length = required(config, "sequence_length")
        self.run_block: Callable[[nn.Module, Tensor, Marks, Tensor], Tensor] = run_block
        self.gradient_checkpointing = False

        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        self.positions = build_positions(config)
        self.embedding_norm = build_normalization(config) if config.embedding_norm else None
        self.token_shift = TokenShift(config.d_model) if config.token_shift else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(build_block(config) for _ in range(config.num_layers))
        self.norm = build_normalization(config)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        initialize(self, config.d_model, config.num_layers, zero_outputs=config.zero_init)

    def forward(
        self,
        input_ids: Tensor,
        *,
        return_hidden: bool = False,
        cache: CacheUse | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Return logits that at position t depend only on tokens 0 to t.

        Args:
            input_ids: (B, T) int64, T at most `sequence_length`.
            return_hidden: stop before the head.
            cache: keeps the keys and values of these tokens and, in a decoding step, stands for
                the tokens before them; see `new_cache`.
            document_ids: (B, T) int64, rising along a row: each document is computed as if it stood
                separately, with positions counted from its beginning. None: a row is one text.

        Returns:
            Logits (B, T, V), or with `return_hidden` what `logits_from_hidden` takes, (B, T, D).

        Raises:
            ValueError: the input is not two-dimensional or longer than the context.
        """
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids must have shape (batch, time), got {tuple(input_ids.shape)}"
            )
        _, time = input_ids.shape
        if time > self.sequence_length:
            raise ValueError(
                f"the input has {time} tokens, the context length is {self.sequence_length}"
            )
        marks: Marks = self.positions
        apart: Attend | None = None
        before: Callable[[Tensor], Tensor] = one_before
        if document_ids is not None:
            places = places_in_documents(document_ids)
            marks, apart = self._apart(document_ids, places)
            before = partial(_one_before_within, places)
        attends: Sequence[Attend | None] = [apart] * len(self.blocks)
        if cache is not None:
            kept, attends = self.positions.at(cache.places), cache.layers
            assert kept is not None  # else there is no cache
            marks, before = kept, cache.before
        x = marks.embed(self.token_embedding(input_ids))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.token_shift is not None:
            x = self.token_shift(x, before(x))
        x = embedded = self.dropout(x)
        for block, attend in zip(self.blocks, attends, strict=True):
            # Compiled code covers only the plain case.
            run = self.run_block if attend is None else partial(run_block, attend=attend)
            if self.gradient_checkpointing and cache is None:
                x = checkpoint(run, block, x, marks, embedded, use_reentrant=False)
            else:
                x = run(block, x, marks, embedded)
        hidden: Tensor = self.norm(x)
        return hidden if return_hidden else self.logits_from_hidden(hidden)

    def _apart(self, document_ids: Tensor, places: Tensor) -> tuple[Marks, Attend]:
        """Return the positions and the attention of rows whose documents do not see each other."""
        marks = self.positions.at(places)
        if marks is None:
            raise ConfigError(
                "these positions cannot be counted from the beginning of each document",
                key="model.positions",
                got=self.config.positions.name,
                fix="set data.packing to continuous, or give the encoding a method `at`",
            )
        dropout = self.config.dropout if self.training else 0.0
        return marks, partial(document_attention, own_document(document_ids), dropout)

    def logits_from_hidden(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) from the model's normalized output (..., D).

        With `logit_softcap` c they are c * tanh(logits / c), inside (-c, c) (Gemma Team 2024,
        section 2).
        """
        logits: Tensor = self.head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def follows_weight_type(self) -> bool:
        """Whether the model can compute with bfloat16 weights, without autocast."""
        return follows_weight_type(self.config)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one forward and backward pass; see `Estimate`."""
        return estimate(self.config).flops_per_token

    def new_cache(self, batch: int, capacity: int) -> KVCache | None:
        """Return an empty cache for `forward`; None if the positions do not support one.

        Args:
            batch: number of rows.
            capacity: tokens a row, 1 to `sequence_length`.
        """
        weight = self.token_embedding.weight
        if self.positions.at(torch.zeros(1, 1, dtype=torch.int64, device=weight.device)) is None:
            return None
        return KVCache(
            batch,
            capacity,
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.kv_heads,
            head_width=self.config.head_width,
            dtype=weight.dtype,
            device=weight.device,
        )

    def num_parameters(self, non_embedding: bool = False) -> int:
        """Count the parameters, a shared one once.

        Args:
            non_embedding: leave out the token embedding, with a head tied to it, and the
                parameters of the positions (the N of Kaplan et al. 2020, section 2.1); an untied
                head stays.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        if not non_embedding:
            return total
        tables = [self.token_embedding.weight, *self.positions.parameters()]
        return total - sum(table.numel() for table in tables)


def _one_before_within(places: Tensor, x: Tensor) -> Tensor:
    """Return `one_before`, 0 where a document begins; `places` (B, T) count from there."""
    return one_before(x).masked_fill((places == 0)[..., None], 0.0)
