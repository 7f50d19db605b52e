"""Peak memory of the loss at a large vocabulary: chunked against the full logits.

    python benchmarks/loss_memory.py [--vocabulary 50304] [--tokens 8192] [--width 768]

Each contestant runs in a process of its own: head and cross-entropy, forward and backward, from
hidden states in float32. Memory is what the process holds at its peak above what it held before
(on a GPU, what the allocator gave out): the weight's gradient is in it, the weight is not.
Gradients are compared by their difference from those of the full logits, relative to their norm.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from fundamentallm.training.losses import LOSSES

CONTESTANTS = {"full": "cross_entropy", "chunked": "chunked_cross_entropy"}


class Head(nn.Module):
    """The part of a model that the loss needs."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary, bias=False)

    def logits_from_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


def host_bytes(field: str) -> int:
    """Read VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"the kernel does not tell {field}")


def measure(name: str, options: argparse.Namespace) -> dict:
    """Run one contestant in this process; save its gradients."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    head = Head(options.width, options.vocabulary).to(device)
    hidden = torch.randn(options.tokens, options.width, device=device).requires_grad_()
    targets = torch.randint(options.vocabulary, (options.tokens,), device=device)
    loss_fn = LOSSES.build(CONTESTANTS[name], {})
    small = Head(options.width, 8).to(device)  # libraries load and buffers grow at first use
    head_loss(loss_fn, small, hidden[:8].detach().requires_grad_(), targets[:8] % 8).backward()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on (man 5 proc)
        before = host_bytes("VmRSS")
    started = time.perf_counter()
    loss = head_loss(loss_fn, head, hidden, targets)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else host_bytes("VmHWM")
    torch.save([hidden.grad.cpu(), head.linear.weight.grad.cpu()], options.gradients)
    return {
        "loss": loss.item() / options.tokens,
        "peak_mb": round((peak - before) / 1e6),
        "seconds": round(seconds, 2),
    }


def head_loss(loss_fn, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed loss."""
    if loss_fn.takes_hidden_states:
        return loss_fn(hidden, head, targets, reduction="sum")
    return loss_fn(head.logits_from_hidden(hidden), targets, reduction="sum")


def main() -> None:
    """Parse the arguments, run the contestants, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=50_304)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measure(options.contestant, options)))
        return
    results, gradients = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        for name in CONTESTANTS:
            path = Path(directory) / name
            command = [sys.executable, __file__, "--contestant", name, "--gradients", str(path)]
            for size in ("vocabulary", "tokens", "width"):
                command += [f"--{size}", str(getattr(options, size))]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name] = json.loads(output.splitlines()[-1])
            gradients[name] = torch.load(path, weights_only=True)
    errors = [
        ((a - b).norm() / b.norm()).item()
        for a, b in zip(gradients["chunked"], gradients["full"], strict=True)
    ]
    ratio = results["chunked"]["peak_mb"] / results["full"]["peak_mb"]
    print(
        json.dumps(
            {
                **{size: getattr(options, size) for size in ("vocabulary", "tokens", "width")},
                **results,
                "memory_ratio": round(ratio, 3),
                "gradient_error": {"hidden": errors[0], "weight": errors[1]},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
