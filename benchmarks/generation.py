"""Tokens a second with the KV cache, against the loop that recomputes the context for each token.

    OMP_NUM_THREADS=2 python benchmarks/generation.py [--rounds 5] [--layers 6] [--width 384]

The model has random weights; nothing is read. Each round measures every kind of generation in turn,
so that a machine that is busy for a while slows them alike; a ratio is the median over the rounds
of the ratio within a round. Where others keep the cores busy, `OMP_NUM_THREADS=1 ... --cpu-time`
counts the processor's seconds in place of the wall's. Prints one JSON object.

- within: from one token to a full context.
- past: from a full context on, for two contexts more, each new beginning of the window included.
- plain: the loop as most write it first, the model on the last tokens that fit, for each token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fundamentallm.config import TransformerConfig
from fundamentallm.models.build import build_model
from fundamentallm.models.generation.batch import Generation
from fundamentallm.models.generation.sampling import SamplingRules
from fundamentallm.models.transformer import Transformer

Clock = Callable[[], float]

RULES = SamplingRules(temperature=0.8, top_k=50)


def cached(model: Transformer, batch: int, prompt: int, number: int, clock: Clock) -> float:
    prompts = [torch.arange(prompt).remainder(model.head.out_features).tolist()] * batch
    started = clock()
    generation = Generation(model, prompts, number, RULES, list(range(batch)))
    for _ in range(number):
        generation.step()
    return batch * number / (clock() - started)


def plain(model: Transformer, batch: int, prompt: int, number: int, clock: Clock) -> float:
    ids = torch.arange(prompt).remainder(model.head.out_features).expand(batch, -1)
    started = clock()
    with torch.inference_mode():
        for _ in range(number):
            logits: Tensor = model(ids[:, -model.sequence_length :])[:, -1] / 0.8
            lowest = logits.topk(50).values[:, -1:]
            chances = logits.masked_fill(logits < lowest, -torch.inf).softmax(-1)
            ids = torch.cat((ids, torch.multinomial(chances, 1)), dim=1)
    return batch * number / (clock() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=65)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=options.vocabulary,
        sequence_length=options.context,
        d_model=options.width,
        num_layers=options.layers,
        num_heads=options.heads,
    )
    model, context, batch = build_model(config).eval(), options.context, options.batch
    kinds: dict[str, Callable[[], float]] = {
        "cached, within": lambda: cached(model, 1, 1, context - 1, clock),
        "plain, within": lambda: plain(model, 1, 1, context - 1, clock),
        "cached, past": lambda: cached(model, 1, context, 2 * context, clock),
        "plain, past": lambda: plain(model, 1, context, 24, clock),
        f"cached, within, batch of {batch}": lambda: cached(model, batch, 1, context - 1, clock),
        f"cached, past, batch of {batch}": lambda: cached(
            model, batch, context, 2 * context, clock
        ),
        f"plain, past, batch of {batch}": lambda: plain(model, batch, context, 3, clock),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for name in kinds:  # warm-up
        kinds[name]()
    for _ in range(options.rounds):
        for name, measure in kinds.items():
            rates[name].append(measure())

    def ratio(one: str, other: str) -> float:
        pairs = zip(rates[one], rates[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 2)

    batch_within, batch_past = (
        f"cached, within, batch of {batch}",
        f"cached, past, batch of {batch}",
    )
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "rounds": options.rounds,
        "clock": "processor" if options.cpu_time else "wall",
        "tokens_per_second": {
            name: {
                "median": round(statistics.median(values), 1),
                "least": round(min(values), 1),
                "most": round(max(values), 1),
            }
            for name, values in rates.items()
        },
        "ratios": {
            "cached to plain, within": ratio("cached, within", "plain, within"),
            "cached to plain, past": ratio("cached, past", "plain, past"),
            "cached within to plain past": ratio("cached, within", "plain, past"),
            f"batch of {batch} within to plain past": ratio(batch_within, "plain, past"),
            f"batch of {batch} past to plain past": ratio(batch_past, "plain, past"),
            f"batch of {batch} past to its plain": ratio(
                batch_past, f"plain, past, batch of {batch}"
            ),
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
