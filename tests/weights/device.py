"""For tests that need CUDA: their marks, a model that is larger than what a device may hold of it,
and what it did hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

_ROOM = 500_000_000


def on_cuda(test: Callable[..., None]) -> Callable[..., None]:
    """Only where there is CUDA."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


def large(folder: Path, seed: int = 0) -> int:
    """A Llama of 270 M numbers in bfloat16; the bytes of its largest tensor.

    As float32, it is twice what streaming may hold on a device.
    """
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4,
        num_attention_heads=16, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    most = max(t.numel() for t in shapes.values())
    numbers = torch.randn(most, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()
    state = {n: numbers[: t.numel()].view(t.shape).clone() for n, t in shapes.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    total = sum(t.numel() for t in state.values())
    assert 4 * total > 1.5 * (2 * 2 * most + _ROOM)
    return 2 * most


@contextmanager
def bounded(largest: int) -> Iterator[None]:
    """What is allocated on the device within stays below twice the largest tensor and 500 MB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    taken = torch.cuda.max_memory_allocated() - before
    assert 0 < taken < 2 * largest + _ROOM
