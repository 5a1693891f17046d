"""Where commands that stream tensors compute."""

from __future__ import annotations

from lorahub_registry.errors import UsageError


def streaming_device(device: str) -> str:
    """``auto`` resolved: CUDA where there is one, otherwise the CPU.

    Raises:
        UsageError: Apple's Metal, which has no float64.
        BaseModelError: no such device on this machine.
    """
    if device in {"auto", "cpu"}:
        import torch

        return "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
    from lorahub_registry.evaluate.base import pick_device

    found = pick_device(device)
    if found.split(":")[0] == "mps":
        raise UsageError("mps has no float64, which this needs", hint="--device cpu")
    return found
