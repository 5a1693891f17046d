"""The modules that LoraHub's benchmarks mix: 20 LoRA folders on a T5 in t5-small's shape."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

MODULES, RANK, ALPHA = 20, 16, 32


def make_base(seed: int) -> T5ForConditionalGeneration:
    """T5 in t5-small's shape, as it is initialised."""
    torch.manual_seed(seed)
    base = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0))
    return base.eval().requires_grad_(False)


def write_modules(base: nn.Module, folder: Path, seed: int) -> list[Path]:
    """LoRA folders written by PEFT: A as large as PEFT makes it, B as after some training."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q", "v"])
    model = get_peft_model(copy.deepcopy(base), config)
    random = torch.Generator().manual_seed(seed)
    folders = []
    for n in range(MODULES):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                size = 0.0255 if "lora_A" in name else 0.005
                parameter.data = torch.randn(parameter.shape, generator=random) * size
        folders.append(folder / f"module-{n:02}")
        model.save_pretrained(folders[-1])
    return folders
