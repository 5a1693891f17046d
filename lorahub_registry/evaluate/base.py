"""The base model, loaded once, with what identifies it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from lorahub_registry.errors import BaseModelError
from lorahub_registry.evaluate.quiet import without_bars
from lorahub_registry.evaluate.tokens import Batch, Encoded, batches, tokens_that_fit
from lorahub_registry.runtime.operator import is_adaptable
from lorahub_registry.weights.files import DTYPES
from lorahub_registry.weights.stream.skeleton import LOADING


@dataclass
class LoadedBase:
    """A base ready to score and to generate.

    Attributes:
        name: as it is written into configs and cards: a Hub id, or a folder's last part.
        revision: the pinned commit of a Hub id.
        seq2seq: encoder–decoder, else causal.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None

    @property
    def seq2seq(self) -> bool:
        """Whether outputs are decoded apart from the prompt."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def task_type(self) -> str:
        """PEFT's name for what the model does."""
        return "SEQ_2_SEQ_LM" if self.seq2seq else "CAUSAL_LM"

    @property
    def device(self) -> torch.device:
        """Where the inputs have to be."""
        return next(self.model.parameters()).device

    @property
    def exact_dtype(self) -> bool:
        """Whether the weights are float32, so that a small delta added to them is not lost."""
        return next(self.model.parameters()).dtype == torch.float32

    def adaptable_modules(self) -> dict[str, nn.Module]:
        """The modules that a LoRA may sit on, by dotted name: linear ones and embeddings."""
        return {name: m for name, m in self.model.named_modules() if is_adaptable(m)}

    def batches(self, rows: Sequence[Encoded], *, gradients: bool = False) -> list[Batch]:
        """``rows`` in batches of like length, on the model's device.

        Args:
            gradients: for backward passes, which keep what every layer gave: smaller ones.
        """
        device, vocabulary = self.device, len(self.tokenizer)
        fitting = tokens_that_fit(device.type, vocabulary)
        return batches(
            rows,
            pad=self.tokenizer.pad_token_id or 0,
            seq2seq=self.seq2seq,
            device=device,
            vocabulary=vocabulary,
            tokens=min(fitting, 2048) if gradients else fitting,
        )


def load_base(
    location: str | Path,
    *,
    name: str,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
) -> LoadedBase:
    """Load a base from a local folder (a Hub id's pinned snapshot is one, too).

    Args:
        device: ``auto`` (cuda, then mps, then cpu) or a device's name.
        dtype: ``auto`` (the checkpoint's own) or one of ``weights.files.DTYPES``.
        quantization: ``8bit`` or ``4bit`` (NF4), by bitsandbytes; None: as it is stored.

    Raises:
        BaseModelError: not a model, a kind that neither continues nor answers text, or one that
            would need its own code (never run).
    """
    place = pick_device(device)
    more = _quantized(quantization, place, dtype) if quantization else {}
    try:
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=False)
        kind = (
            transformers.AutoModelForSeq2SeqLM
            if getattr(config, "is_encoder_decoder", False)
            else transformers.AutoModelForCausalLM
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        with LOADING, without_bars():
            model = kind.from_pretrained(
                location,
                dtype="auto" if dtype == "auto" else DTYPES[dtype],
                trust_remote_code=False,
                use_safetensors=True,
                **more,
            )
        if not getattr(model, "is_quantized", False):  # those are placed as they are loaded
            model = model.to(place)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"the base {name} cannot be loaded: {first}",
            hint="lorareg takes causal and seq2seq language models whose folder holds config.json, "
            "safetensors and a tokenizer, and that need no code of their own",
        ) from error
    return adopt(model, tokenizer, name=name, revision=revision)


def _quantized(bits: str, device: str, dtype: str) -> dict[str, Any]:
    """What loads a model in so many bits: QLoRA's NF4 (arXiv:2305.14314), or LLM.int8()."""
    check_quantization(bits)
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES.get(dtype, torch.float32),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def check_quantization(bits: str) -> None:
    """Whether a base can be loaded in so many bits here.

    Raises:
        BaseModelError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise BaseModelError(
            f"quantization: {bits} needs bitsandbytes, which is not installed",
            hint="pip install 'lorareg[bitsandbytes]'",
        )


def adopt(model: Any, tokenizer: Any, *, name: str, revision: str | None = None) -> LoadedBase:
    """Take loaded objects as the base; the model is put into evaluation mode, without gradients.

    Raises:
        BaseModelError: it carries adapters.
    """
    check_plain(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.eval()
    model.requires_grad_(False)
    return LoadedBase(model, tokenizer, name, revision)


def check_plain(model: Any) -> None:
    """Whether a loaded model is a base and nothing more.

    Raises:
        BaseModelError: it carries adapters.
    """
    if hasattr(model, "peft_config"):
        raise BaseModelError(
            "the model carries PEFT adapters already",
            hint="pass the plain base: adapters are read from their files",
        )


def pick_device(device: str) -> str:
    """``auto`` resolved, and a device that is not there refused.

    Raises:
        BaseModelError: no such device on this machine.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, present in there.items() if present)
    if not there.get(device.split(":")[0], False):
        raise BaseModelError(
            f"device {device!r} is not on this machine",
            hint=f"use one of: auto, {', '.join(n for n, present in there.items() if present)}",
        )
    return device
