"""Tokens a second with the KV cache, against the loop that recomputes the context for each token.

    OMP_NUM_THREADS=2 python benchmarks/generation.py [--rounds 5] [--layers 6] [--width 384]
    OMP_NUM_THREADS=2 python benchmarks/generation.py --others [--tokens 300] [--isa avx2]
    python benchmarks/generation.py --loss RUN TEXT

The model has random weights; nothing is read. Each round measures every kind of generation in turn,
so that a machine that is busy for a while slows them alike; a ratio is the median over the rounds
of the ratio within a round. Where others keep the cores busy, `OMP_NUM_THREADS=1 ... --cpu-time`
counts the processor's seconds in place of the wall's. Prints one JSON object.

- within: from one token to a full context.
- past: from a full context on, for two contexts more, each new beginning of the window included.
- plain: the loop as most write it first, the model on the last tokens that fit, for each token.

`--others` measures the same weights in this package (the model's own steps, and native code with
fp32, bf16 and int8 weights), `transformers` and, where `llama-cpp-python` is there, llama.cpp
(F32 and Q8_0), for one text and a batch. llama.cpp has the instruction set that it was compiled
for, whatever `--isa` says; the report tells which.

`--loss` measures the loss of a run on the end of a text, each token predicted by the steps of
generation, with each type of weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import ISAS, limit_this_process, machine_report
from torch import Tensor

from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.inference.export import export
from fundamentallm.inference.load import Trained, load_trained
from fundamentallm.models.build import build_model
from fundamentallm.models.generation.batch import Decode, Generation
from fundamentallm.models.generation.sampling import SamplingRules
from fundamentallm.models.native.decoding import WEIGHT_TYPES, NativeDecoder
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.checkpoint.manifest import Manifest

Clock = Callable[[], float]

RULES = SamplingRules(temperature=0.8, top_k=50)


def cached(
    model: Transformer,
    batch: int,
    prompt: int,
    number: int,
    clock: Clock,
    decode: Decode | None = None,
) -> float:
    prompts = [torch.arange(prompt).remainder(model.head.out_features).tolist()] * batch
    started = clock()
    generation = Generation(model, prompts, number, RULES, list(range(batch)), decode=decode)
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


def transformers_rate(model: Any, batch: int, number: int, clock: Clock) -> float:
    ids = torch.zeros(batch, 1, dtype=torch.int64)
    rules = {"do_sample": True, "temperature": 0.8, "top_k": 50}
    lengths = {"min_new_tokens": number, "max_new_tokens": number, "pad_token_id": 0}
    started = clock()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **rules, **lengths)
    assert out.shape == (batch, number + 1)
    return batch * number / (clock() - started)


def llama_rate(model: Any, number: int, clock: Clock) -> float:
    model.reset()
    started = clock()
    tokens = model.generate([1], temp=0.8, top_k=50, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
    for _ in range(number):
        next(tokens)
    return number / (clock() - started)


def beside_others(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Return tokens a second of every contestant, from the same weights."""
    config = TransformerConfig(
        vocab_size=options.vocabulary,
        sequence_length=256 * -(-(options.tokens + 1) // 256),
        d_model=options.width,
        num_layers=options.layers,
        num_heads=options.heads,
    )
    model, batch, number = build_model(config).eval(), options.batch, options.tokens
    singles: dict[str, Callable[[], float]] = {}
    batches: dict[str, Callable[[], float]] = {}
    decoders = {"model": None, **{name: NativeDecoder(model, name) for name in WEIGHT_TYPES}}
    for name, decode in decoders.items():
        singles[f"ours, {name}"] = lambda d=decode: cached(model, 1, 1, number, clock, d)
        batches[f"ours, {name}"] = lambda d=decode: cached(model, batch, 1, number // 3, clock, d)
    systems = {}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = CharacterTokenizer([chr(0x20 + n) for n in range(options.vocabulary)])
        run = RunConfig().model_copy(update={"model": config})
        manifest = Manifest("step-0", 0, {}, {}, "")
        one = Trained(model, tokenizer, run, Path(scratch), manifest, False)
        try:
            import transformers

            export(one, "hf", Path(scratch) / "hf")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(scratch) / "hf").eval()
            theirs.generation_config.eos_token_id = None
            singles["transformers"] = lambda: transformers_rate(theirs, 1, number, clock)
            batches["transformers"] = lambda: transformers_rate(theirs, batch, number // 3, clock)
        except ImportError as error:
            systems["transformers"] = f"not measured: {error}"
        try:
            import llama_cpp

            systems["llama.cpp"] = llama_cpp.llama_print_system_info().decode()
            for kind in ("F32", "Q8_0"):
                export(one, "gguf", Path(scratch) / kind, {"type": kind})
                other = llama_cpp.Llama(
                    str(Path(scratch) / kind / "model.gguf"),
                    n_ctx=config.sequence_length or 0,
                    n_threads=torch.get_num_threads(),
                    verbose=False,
                )
                singles[f"llama.cpp, {kind}"] = lambda o=other: llama_rate(o, number, clock)
        except ImportError as error:
            systems["llama.cpp"] = f"not measured: {error}"
        tables = {"one text": singles, f"batch of {batch}": batches}
        rates: dict[str, dict[str, list[float]]] = {
            title: {name: [] for name in kinds} for title, kinds in tables.items()
        }
        for number_of_round in range(options.rounds + 1):  # the first is a warm-up
            for title, kinds in tables.items():
                for name, measure in kinds.items():
                    rate = measure()
                    if number_of_round:
                        rates[title][name].append(rate)
    ours = {"Q8_0": "ours, int8"}

    def ratio(rates: dict[str, list[float]], name: str) -> float:
        mine = rates[ours.get(name.rpartition(" ")[2], "ours, fp32")]
        return round(statistics.median(a / b for a, b in zip(mine, rates[name], strict=True)), 2)

    return {
        "machine": machine_report(options.isa),
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "clock": "processor" if options.cpu_time else "wall",
        **systems,
        **{
            title: {
                "tokens a second": {k: round(statistics.median(v), 1) for k, v in found.items()},
                "ours in the same type to it": {
                    name: ratio(found, name) for name in found if not name.startswith("ours, ")
                }
                | {"ours, model": ratio(found, "ours, model")},
            }
            for title, found in rates.items()
        },
    }


def losses(run: Path, text: Path, rows: int = 64) -> dict[str, Any]:
    """Return the loss on the last tokens of a text by type of weights, by steps of generation."""
    trained = load_trained(run, torch.device("cpu"))
    model = trained.model
    assert isinstance(model, Transformer)
    length = model.sequence_length
    ids = torch.tensor(trained.tokenizer.encode(text.read_text(encoding="utf-8"))).long()
    windows = ids[-rows * (length + 1) :].view(rows, length + 1)
    found: dict[str, float] = {}
    with torch.inference_mode():
        logits = model(windows[:, :-1])
        found["model"] = float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
        for weights in WEIGHT_TYPES:
            decode, cache = NativeDecoder(model, weights), model.new_cache(rows, length)
            assert cache is not None
            steps = [
                F.cross_entropy(decode(windows[:, t], cache), windows[:, t + 1])
                for t in range(length)
            ]
            found[weights] = float(torch.stack(steps).double().mean())
    return {
        "run": str(trained.origin),
        "parameters": model.num_parameters(),
        "tokens": rows * length,
        "loss": {name: round(loss, 5) for name, loss in found.items()},
        "above fp32": {name: round(loss - found["fp32"], 5) for name, loss in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=65)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--others", action="store_true", help="measure other programs too")
    parser.add_argument("--tokens", type=int, default=300, help="of a text, with --others")
    parser.add_argument("--isa", choices=ISAS, help="limit the processor to this instruction set")
    parser.add_argument("--loss", nargs=2, type=Path, metavar=("RUN", "TEXT"))
    options = parser.parse_args()
    limit_this_process(options.isa)
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.manual_seed(0)
    if options.others or options.loss:
        print(
            json.dumps(
                losses(*options.loss) if options.loss else beside_others(options, clock), indent=2
            )
        )
        return
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
