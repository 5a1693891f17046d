"""MixLoRA, LoRAMoE and MoLA from files and to files: this program's layout, and m-LoRA's own.

Both have the same names (see :mod:`lorahub_registry.adapters.mixlora_keys`). m-LoRA's readers, the
packages ``mixlora`` and ``moe_peft``, take nothing but a pickle of float32 tensors.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.facts import read_config
from lorahub_registry.adapters.mixlora import (
    KINDS,
    MixLora,
    Switch,
    TopK,
    check_shapes,
    modern_names,
    parse_mixlora,
    settled,
    to_config,
)
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME, read_header
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, UnknownRef
from lorahub_registry.weights.convert import unpickled

Tensors = dict[str, torch.Tensor]
_KNOWN_THERE = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj", "dense", "fc1",
    "fc2", "qkv_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h",
})  # fmt: skip
_NEWER = frozenset({"dense_h_to_4h", "dense_4h_to_h"})  # moe_peft's alone


def read_mixlora(folder: Path) -> tuple[MixLora, Tensors]:
    """What a folder's config says, and its tensors by native name, in the file's dtypes.

    Names of m-LoRA's first checkpoints are read, too.

    Raises:
        UnknownRef: there is no config, or there are no weights.
        IncompatibleAdapters: another kind of adapter, or weights that are a pickle.
        BrokenAdapter: config and tensors disagree, the file is damaged, or a tensor holds NaN.
    """
    mix, path = _said(folder), folder / WEIGHTS_NAME
    if path.is_file():
        return _read(mix, path, str(path))
    if (folder / PICKLE_NAME).is_file():
        raise IncompatibleAdapters(
            f"{folder}: its weights are a pickle ({PICKLE_NAME}), which is never loaded",
            hint=f"lorareg convert {folder} FOLDER --to peft",
        )
    raise UnknownRef(f"{folder}: no {WEIGHTS_NAME} there")


def read_any(folder: Path, *, timeout_s: float = 600.0) -> tuple[MixLora, Tensors]:
    """The same, from a pickle where there is nothing else: a child process reads it.

    Args:
        timeout_s: seconds after which the pickle is given up.

    Raises:
        UnknownRef, IncompatibleAdapters, BrokenAdapter: see :func:`read_mixlora`; a pickle that is
            damaged or holds more than tensors.
    """
    source = folder / PICKLE_NAME
    if (folder / WEIGHTS_NAME).is_file() or not source.is_file():
        return read_mixlora(folder)
    mix = _said(folder)
    with (
        tempfile.TemporaryDirectory() as beside,
        unpickled(source, beside=Path(beside), timeout_s=timeout_s) as part,
    ):
        return _read(mix, part, str(source))


def write_mixlora(folder: Path, mix: MixLora, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; each is whole or not there.

    Args:
        folder: exists already.
        tensors: by native name; their dtypes are kept.

    Raises:
        BrokenAdapter: they are not what ``mix`` speaks of, or hold NaN or infinity.
    """
    out = _checked(mix, tensors, str(folder))
    part = folder / f".{WEIGHTS_NAME}"
    try:
        save_file(out, part, metadata={"format": "pt"})
        part.chmod(0o644)
        os.replace(part, folder / WEIGHTS_NAME)
    finally:
        part.unlink(missing_ok=True)
    _write_config(folder, to_config(mix))


def write_mlora(folder: Path, mix: MixLora, tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Write ``adapter_config.json`` and ``adapter_model.bin`` as m-LoRA's readers take them.

    Args:
        folder: exists already.
        tensors: by native name; written as float32, which holds half precision exactly.

    Returns:
        What one of the two packages will not read, a sentence each.

    Raises:
        IncompatibleAdapters: something that neither of them can read.
        BrokenAdapter: see :func:`write_mixlora`.
    """
    mix = settled(mix, tensors)
    if problems := _unreadable(mix):
        said = "".join(f"\n  {problem}" for problem in problems)
        raise IncompatibleAdapters(
            f"m-LoRA's readers cannot read this {mix.kind} adapter:{said}",
            hint="lorareg convert … --to peft keeps all of it",
        )
    out = {k: v.float() for k, v in _checked(mix, tensors, str(folder)).items()}
    part = folder / f".{PICKLE_NAME}"
    try:
        torch.save(out, part)
        os.replace(part, folder / PICKLE_NAME)
    finally:
        part.unlink(missing_ok=True)
    # Both want these keys; mixlora takes no other task for a decoder.
    needed: dict[str, Any] = {"task_type": "CAUSAL_LM", "base_model_name_or_path": ""}
    _write_config(folder, needed | to_config(mix))
    return tuple(_notes(mix))


def _said(folder: Path) -> MixLora:
    config = read_config(folder)
    if config.peft_type not in KINDS:
        raise IncompatibleAdapters(
            f"{folder}: it is {config.peft_type}, none of {', '.join(KINDS)}",
            hint="a MixLoRA is composed of several LoRA adapters: a recipe with "
            "method: {type: mixlora}"
            if config.peft_type == "LORA"
            else None,
        )
    return parse_mixlora(config.raw, str(folder / CONFIG_NAME))


def _read(mix: MixLora, path: Path, where: str) -> tuple[MixLora, Tensors]:
    header = read_header(path)
    try:
        names = modern_names(header.tensors, mix)
    except BrokenAdapter as error:
        raise BrokenAdapter(f"{where}: {error}", hint=error.hint) from None
    check_shapes(mix, {new: header.tensors[old].shape for old, new in names.items()}, where)
    loaded = load_file(path)
    tensors = {new: loaded[old] for old, new in sorted(names.items(), key=lambda pair: pair[1])}
    _check_values(tensors, where)
    return settled(mix, tensors), tensors


def _checked(mix: MixLora, tensors: Mapping[str, torch.Tensor], where: str) -> Tensors:
    """``tensors`` sorted, on the CPU, each with memory of its own."""
    check_shapes(mix, {name: tuple(value.shape) for name, value in tensors.items()}, where)
    _check_values(tensors, where)
    return {
        name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }


def _check_values(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise BrokenAdapter(f"{where}: {name} is of {value.dtype}, not of floating point")
        if not torch.isfinite(value).all():
            raise BrokenAdapter(
                f"{where}: {name} holds NaN or infinity",
                hint="leave this adapter out; its training diverged or the file is damaged",
            )


def _unreadable(mix: MixLora) -> list[str]:
    """What neither ``mixlora`` nor ``moe_peft`` reads."""
    problems = []
    parts = {"lora_alpha": mix.attention}
    if mix.experts != mix.attention:
        parts["expert_lora's lora_alpha"] = mix.experts
    for key, part in parts.items():
        if part.lora_alpha != int(part.lora_alpha):
            problems.append(f"{key} is {part.lora_alpha:g}, and they take whole numbers alone")
    if mix.attention.use_dora or mix.experts.use_dora:
        problems.append("use_dora is on, and they read no magnitudes: they would start anew")
    if isinstance(mix.routing, Switch) and mix.routing.sparse_step is not None:
        problems.append("some layers have no experts (sparse_step), and they want them in all")
    problems += [
        f"target_modules names {name}, which they do not know"
        for name in mix.target_modules
        if name not in _KNOWN_THERE
    ]
    return problems


def _notes(mix: MixLora) -> list[str]:
    """What ``mixlora`` does not read and ``moe_peft`` does."""
    alone = []
    if not (mix.kind == "MIXLORA" and isinstance(mix.routing, TopK)):
        alone.append(f"routing_strategy {mix.strategy}")
    if mix.experts != mix.attention:
        alone.append("expert_lora")
    if mix.kind == "MIXLORA" and mix.act_fn is None:
        alone.append("a config without act_fn")
    if not mix.attention.lora_dropout:
        alone.append("a lora_dropout of 0")
    if mix.base is None:
        alone.append("a config without base_model_name_or_path")
    if mix.task_type not in {None, "CAUSAL_LM", "QUESTION_ANS"}:
        alone.append(f"task_type {mix.task_type}")
    alone += [name for name in mix.target_modules if name in _NEWER]
    return [
        f"load it with the package moe_peft: the package mixlora does not read {what}"
        for what in alone
    ]


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    part = folder / f".{CONFIG_NAME}"
    try:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / CONFIG_NAME)
    finally:
        part.unlink(missing_ok=True)
