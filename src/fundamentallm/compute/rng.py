"""The state of every global random generator, as tensors and plain values, and back."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fundamentallm.errors import CheckpointError

CUDA = "cuda:"  # followed by the device's index


def capture_rng(device: torch.device | None = None) -> dict[str, Any]:
    """Return the states of Python's, NumPy's (global) and torch's generators.

    Args:
        device: where a run computes. If it is a GPU, only its generator is in the state: how many
            others the process sees says nothing about the run. None: every GPU's.

    Returns:
        `python` and `numpy`: dicts of plain values and one int64 tensor of 624 words; `torch` and,
        if CUDA is in use, `cuda:0`, `cuda:1`, ...: uint8 tensors on the CPU. All are copies.
    """
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": {
            "version": version,
            "key": torch.tensor(words[:-1], dtype=torch.int64),
            "pos": words[-1],
            "gauss": gauss,
        },
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state.update(_of_gpu(device))
    elif _cuda_in_use():  # asking an unused CUDA would occupy every device
        for index, cuda_state in enumerate(torch.cuda.get_rng_state_all()):
            state[f"{CUDA}{index}"] = cuda_state
    return state


def capture_generators(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators that a step on a device draws from.

    Cheap enough for every step; `restore_generators` takes it.
    """
    state = {"torch": torch.default_generator.get_state()}
    if device.type == "cuda":
        state.update(_of_gpu(device))
    return state


def restore_generators(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators of a device into the states that `capture_generators` returned.

    The GPU may have another number than the one that the state is of; a CPU takes its part alone.
    """
    for name, value in state.items():
        if name == "torch":
            torch.set_rng_state(value)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(value, _index_of(device))


def check_generators(state: Any) -> None:
    """Check a state that comes from a file; no generator is changed.

    Raises:
        CheckpointError: `capture_generators` cannot have returned it.
    """
    try:
        torch.Generator().set_state(state["torch"])
        for name in state:
            if name != "torch" and not re.fullmatch(rf"{CUDA}\d{{1,4}}", name):
                raise ValueError(f"'{name}' is not a generator")
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            "the saved state of the random generators is unusable",
            got=f"{type(error).__name__}: {error}",
        ) from error


def restore_rng(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Put the global generators into the states that `capture_rng` returned.

    The state of a single GPU goes to the device's, whichever number it had. If the CUDA devices
    differ from the saved run's otherwise, the ones present are restored and a warning says that
    random numbers differ from now on.

    Args:
        state: of `capture_rng`.
        device: where a run computes, as for `capture_rng`.

    Raises:
        CheckpointError: a generator refuses its state; no generator was changed.
    """
    devices = set(range(torch.cuda.device_count()))
    saved = {int(key.removeprefix(CUDA)): state[key] for key in state if key.startswith(CUDA)}
    needed = devices if _cuda_in_use() else set()
    lost = saved.keys() - devices
    if device is not None and device.type == "cuda":
        needed, lost = {_index_of(device)}, set()
        if len(saved) == 1:
            saved = dict(zip(needed, saved.values(), strict=True))
    try:
        python_state = _python_state(state["python"])
        numpy_state = _numpy_state(state["numpy"])
        # Scratch generators check every state before a global generator changes.
        random.Random().setstate(python_state)
        np.random.RandomState().set_state(numpy_state)
        torch.Generator().set_state(state["torch"])
        for index in saved.keys() & devices:
            torch.Generator(f"{CUDA}{index}").set_state(saved[index])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            "the saved state of the random generators is unusable",
            got=f"{type(error).__name__}: {error}",
            fix="resume with the torch version that saved it",
        ) from error
    if lost or needed - saved.keys():
        warnings.warn(
            f"the state has {len(saved)} CUDA generators, this machine {len(devices)}: random"
            " numbers on the others start again, so the run is not continued exactly",
            stacklevel=2,
        )
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    for index in saved.keys() & devices:
        torch.cuda.set_rng_state(saved[index], index)


def _python_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return (state["version"], (*state["key"].tolist(), state["pos"]), state["gauss"])


def _numpy_state(state: Mapping[str, Any]) -> dict[str, Any]:
    key = state["key"].numpy().astype(np.uint32)
    return {
        "bit_generator": state["bit_generator"],
        "state": {"key": key, "pos": state["pos"]},
        "has_gauss": state["has_gauss"],
        "gauss": state["gauss"],
    }


def _of_gpu(device: torch.device) -> dict[str, torch.Tensor]:
    index = _index_of(device)
    return {f"{CUDA}{index}": torch.cuda.get_rng_state(index)}


def _index_of(gpu: torch.device) -> int:
    return torch.cuda.current_device() if gpu.index is None else gpu.index


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
