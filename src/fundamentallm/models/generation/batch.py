"""From prompts to texts: one more token for each row of a batch, step by step.

The model sees a part of a text, its context, which is the same with and without a KV cache:

- While the text fits into the context length T, the context is the whole text; of a longer prompt
  it is the last T tokens.
- When one more token would not fit, the context restarts with the newest token and the T // 2
  before it, and grows from there.

A context that slides by a token each time would give every key and value another position, and
what the upper layers keep of a token also depends on the tokens before it; so each token would
cost a whole context. Restarting every (T + 1) // 2 tokens costs half a context that often,
and the cached text is exactly the text of plain forward passes over the same contexts.

A row never depends on the other rows: it has its own context, length and random numbers. So a row
that has ended can leave its place to another prompt while the others go on.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fundamentallm.models.calling import context_of, inputs_for, logits_of
from fundamentallm.models.generation.cache import KVCache
from fundamentallm.models.generation.sampling import SamplingRules, sample_next

Decode = Callable[[Tensor, KVCache], Tensor]
"""One more token of each row, (R,) int64, and a cache with room for it, to logits (R, V)."""

_DRAWS = 64  # random numbers taken at once; part of what a seed means


class Generation:
    """Texts that grow by one token a step.

    Each step runs without gradients and in evaluation mode; between steps the modes of all
    modules are as they were. The global random state is never touched.

    Args:
        model: maps (B, T) int64 ids to logits (B, T, V), causally. It sees at most `context_of`
            tokens. If it has `new_cache`, as `Transformer` does, a step computes only the new
            tokens; of a model of `transformers` the context is computed at every step.
        prompts: token ids, at least one each; any length.
        max_new_tokens: the most steps that will be taken for a prompt, >= 0.
        rules: how a token is chosen.
        seeds: one for each row, 0 to 2^64 - 1; None: of chance. A row's text follows from its
            only on prompt and seed, on any device.
        use_cache: False recomputes the context at every step, the reference for the cache.
        vocab_size: the ids that may be drawn are 0 to this, exclusive; None: all of the model's.
            A model whose vocabulary is padded has logits for ids that mean nothing.
        decode: computes the steps in place of the model, which only fills the cache, such as
            `fundamentallm.models.native.decoding.NativeDecoder`.
        longest: tokens of the longest prompt that will replace one of these.

    Attributes:
        rows: numbers of the prompts that still grow.
        texts: all ids of each prompt and its generated ids, also of rows that ended.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        rules: SamplingRules,
        seeds: Sequence[int] | None = None,
        *,
        use_cache: bool = True,
        vocab_size: int | None = None,
        decode: Decode | None = None,
        longest: int = 0,
    ) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("there must be prompts, each of at least one token")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if seeds is None:
            seeds = [secrets.randbits(63) for _ in prompts]
        if len(seeds) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(seeds)} seeds")
        self.model = model
        self.rules = rules
        self.vocab_size = vocab_size
        self.decode = decode
        self.rows = list(range(len(prompts)))
        self.texts = [[operator.index(token) for token in prompt] for prompt in prompts]
        self._max_new_tokens = max_new_tokens
        self._modules = list(model.modules())
        parameter = next(model.parameters(), None)
        self._device = torch.device("cpu") if parameter is None else parameter.device
        self._context = context_of(model)
        self._starts = [
            0 if self._context is None else max(0, len(text) - self._context) for text in self.texts
        ]
        self._cache: KVCache | None = None
        if use_cache and max_new_tokens and hasattr(model, "new_cache"):
            longest = max(longest, *map(len, prompts)) + max_new_tokens - 1
            with torch.inference_mode():
                self._cache = model.new_cache(  # type: ignore[operator]
                    len(prompts), min(longest, self._context or longest)
                )
        self._last = self._tensor([text[-1] for text in self.texts])
        # Always on the CPU, so that a seed means the same text on every device.
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._uniforms = torch.empty(len(prompts), 0, dtype=torch.float64)
        self._num_drawn = [0] * len(prompts)  # of each row that grows
        self._begun = list(range(len(prompts)))  # places whose prompt no step has seen
        self._seen: Tensor | None = None

    def step(self) -> Tensor:
        """Add one token to each row that still grows.

        Returns:
            The tokens, (R,) int64, in the order of `rows`.

        Raises:
            NumericalError: as in `sample_next`.
        """
        assert max(self._num_drawn) < self._max_new_tokens
        with torch.inference_mode(), self._evaluation_mode():
            logits = self._next_logits()[:, : self.vocab_size]  # (R, V)
            if self.rules.repetition_penalty != 1:
                self._mark_seen(logits)
            self._last = sample_next(logits, self.rules, self._next_uniforms(), self._seen)
        self._num_drawn = [number + 1 for number in self._num_drawn]
        for row, token in zip(self.rows, self._last.tolist(), strict=True):
            self.texts[row].append(token)
        # Not an inference tensor, which autograd would refuse wherever the caller takes it.
        return self._last.clone()

    def end(self, rows: Sequence[int]) -> None:
        """Stop growing rows.

        Args:
            rows: numbers of prompts.
        """
        places = [place for place, row in enumerate(self.rows) if row not in rows]
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        self._generators = [self._generators[place] for place in places]
        self._num_drawn = [self._num_drawn[place] for place in places]
        self._begun = [places.index(place) for place in self._begun if place in places]
        self._uniforms = self._uniforms[places]
        with torch.inference_mode():
            self._last = self._last[places]
            if self._seen is not None:
                self._seen = self._seen[places]
            if self._cache is not None:
                self._cache.keep(places)

    def replace(self, row: int, prompt: Sequence[int], seed: int) -> int:
        """Give the place of a row to another prompt; return the number of the new row.

        Args:
            row: one of `rows`, which stops growing.
            prompt: token ids, at least one and at most `longest`.
            seed: of the new row.

        Raises:
            ValueError: the prompt is empty.
        """
        if not len(prompt):
            raise ValueError("there must be prompts, each of at least one token")
        place, text = self.rows.index(row), [operator.index(token) for token in prompt]
        self.rows[place] = len(self.texts)
        self.texts.append(text)
        self._starts.append(0 if self._context is None else max(0, len(text) - self._context))
        self._generators[place] = torch.Generator().manual_seed(seed)
        self._num_drawn[place] = 0
        self._begun.append(place)
        with torch.inference_mode():
            self._last[place] = text[-1]
            if self._seen is not None:
                self._seen[place] = False
                self._seen[place, self._tensor(text)] = True
        return self.rows[place]

    def _next_logits(self) -> Tensor:
        """Return the logits (R, V) after the last token of each row."""
        begun, self._begun = sorted(self._begun), []
        for place, row in enumerate(self.rows):
            if self._context is not None:
                length = len(self.texts[row]) - self._starts[row]
                if length > self._context:  # never of one that begins
                    self._starts[row] += (self._context + 1) // 2
                    begun.append(place)
        if self._cache is None:
            return self._recomputed_logits()
        if begun:
            self._fill(self._cache, begun)
        if self.decode is not None:
            return self.decode(self._last, self._cache)
        return self.model(self._last.unsqueeze(-1), cache=self._cache.step())[:, 0]  # type: ignore[no-any-return]

    def _fill(self, cache: KVCache, places: list[int]) -> None:
        """Fill the cache with contexts, without their last tokens, which the step computes."""
        windows = [self._window(self.rows[place])[:-1] for place in places]
        use = cache.fill(places, [len(window) for window in windows])
        if all(window == windows[0] for window in windows):
            del windows[1:]  # read once, kept for all
        ids = self._padded(windows)
        if ids.numel():
            self.model(ids, return_hidden=True, cache=use)

    def _recomputed_logits(self) -> Tensor:
        windows = [self._window(row) for row in self.rows]
        logits = logits_of(self.model(self._padded(windows), **inputs_for(self.model, {})))
        lasts = self._tensor([len(window) - 1 for window in windows])
        return logits[torch.arange(len(lasts), device=logits.device), lasts]

    def _window(self, row: int) -> list[int]:
        return self.texts[row][self._starts[row] :]

    def _padded(self, windows: list[list[int]]) -> Tensor:
        """Return (len(windows), T), padded at the right, where causality hides it."""
        time = max(map(len, windows))
        return self._tensor([window + [0] * (time - len(window)) for window in windows])

    def _tensor(self, ids: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)

    def _next_uniforms(self) -> Tensor | None:
        if self.rules.temperature == 0:
            return None
        columns = [number % _DRAWS for number in self._num_drawn]
        if 0 in columns:
            if not self._uniforms.numel():
                self._uniforms = torch.empty(
                    len(columns), _DRAWS, dtype=torch.float64, device=self._device
                )
            for place, column in enumerate(columns):
                if column == 0:
                    generator = self._generators[place]
                    numbers = torch.rand(_DRAWS, dtype=torch.float64, generator=generator)
                    self._uniforms[place] = numbers
        if columns.count(columns[0]) == len(columns):
            return self._uniforms[:, columns[0]]
        return self._uniforms.gather(1, self._tensor([[column] for column in columns]))[:, 0]

    def _mark_seen(self, logits: Tensor) -> None:
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for place, row in enumerate(self.rows):
                self._seen[place, self._tensor(self.texts[row])] = True
        self._seen.scatter_(1, self._last.unsqueeze(-1), True)

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        training = [module for module in self._modules if module.training]
        if training:
            self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def generate_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    rules: SamplingRules,
    seeds: Sequence[int] | None = None,
    *,
    use_cache: bool = True,
    vocab_size: int | None = None,
    decode: Decode | None = None,
) -> Iterator[Tensor]:
    """Continue prompts, one token at a time.

    Args:
        model, prompts, max_new_tokens, rules, seeds, use_cache, vocab_size, decode: as in
            `Generation`.

    Returns:
        An iterator over `max_new_tokens` tensors of ids (B,) int64.

    Raises:
        ValueError: an argument is out of range, at the call, before the first token.
        NumericalError: as in `sample_next`, while iterating.
    """
    generation = Generation(
        model,
        prompts,
        max_new_tokens,
        rules,
        seeds,
        use_cache=use_cache,
        vocab_size=vocab_size,
        decode=decode,
    )
    return (generation.step() for _ in range(max_new_tokens))
