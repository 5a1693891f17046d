"""Pairs of tiny models: one of an architecture, and one that was trained from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests import tiny

SMALL = {
    "vocab_size": 71, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"head_dim": 8},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma": {"head_dim": 8},
    "Phi": {"num_key_value_heads": 4},
    "GPT2": {
        "vocab_size": 71, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
    "T5": {
        "vocab_size": 71, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    },
}  # fmt: skip


def model(name: str, **more: Any) -> Any:
    """A random model of this architecture, float32, in evaluation mode."""
    import transformers as hf

    own = ARCHITECTURES[name]
    options = own if name in {"GPT2", "T5"} else SMALL | own
    kind = {"T5": "T5ForConditionalGeneration", "GPT2": "GPT2LMHeadModel"}.get(
        name, f"{name}ForCausalLM"
    )
    torch.manual_seed(11)
    made = getattr(hf, kind)(getattr(hf, f"{name}Config")(**{**options, **more}))
    return made.eval()


def tuned(base: Any, *, size: float = 0.05, only: str = "", seed: int = 0) -> Any:
    """A copy whose parameters (those with ``only`` in their name) all differ a little."""
    made = copy.deepcopy(base)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=drawn) * size
            if only in name:
                parameter.add_(noise.to(parameter.dtype))
    return made


def save(made: Any, folder: Path, **more: Any) -> Path:
    """``made`` in ``folder``, with a tokenizer."""
    made.save_pretrained(folder, **more)
    tiny.tokenizer(bos=True, eos=False).save_pretrained(folder)
    return folder


def logits(made: Any) -> torch.Tensor:
    """Of some fixed rows."""
    ids = torch.arange(3, 39).view(3, 12)
    more: Mapping[str, Any] = {}
    if made.config.is_encoder_decoder:
        more = {"decoder_input_ids": ids[:, :7]}
    with torch.inference_mode():
        return made(input_ids=ids, **more).logits
