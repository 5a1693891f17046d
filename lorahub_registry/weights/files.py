"""Adapters from files and to files: PEFT's format, read and written without PEFT."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.facts import PREFIX, AdapterFacts
from lorahub_registry.adapters.tensors import WEIGHTS_NAME, Header, TensorInfo, read_header
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters
from lorahub_registry.weights.lowrank import Deltas, LowRank

_LINEAR_KEYS = ("A.weight", "B.weight")
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load_deltas(folder: Path, facts: AdapterFacts) -> dict[str, LowRank]:
    """The adapter's deltas in float32 on the CPU, scaling folded into B.

    Args:
        facts: of the same folder; its modules must be linear or embeddings.

    Raises:
        BrokenAdapter: a tensor holds NaN or infinity.
        IncompatibleAdapters: a module is a convolution.
    """
    kinds = {module.name: module.kind for module in facts.modules}
    if conv := sorted(name for name, kind in kinds.items() if kind == "conv"):
        raise IncompatibleAdapters(f"{folder}: {conv[0]} is conv LoRA, which is no matrix")
    return {
        # The factors are nobody else's: scaled where they lie.
        name: LowRank(a, b.mul_(scaling), "embedding" if kinds[name] == "embedding" else "linear")
        for name, (a, b, scaling) in load_factors(folder, facts).items()
    }


def load_factors(
    folder: Path, facts: AdapterFacts
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Module → (A, B, scaling), float32 on the CPU, as they lie in the file.

    Raises:
        BrokenAdapter: a tensor holds NaN or infinity.
    """
    path = folder / WEIGHTS_NAME
    header = read_header(path)
    if _all_float32(header):
        data = torch.empty(header.data_bytes // 4)
        _read_into(data, path, header)
        tensors = {name: _view(data, header.tensors[name]) for name in header.tensors}
    else:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        _check_finite(path, tensors)
    return {m.name: (tensors[m.key_a], tensors[m.key_b], m.scaling) for m in facts.modules}


def load_flat(
    adapters: Sequence[tuple[Path, AdapterFacts]],
) -> tuple[torch.Tensor, dict[str, tuple[int, int]]]:
    """All factors in one float32 matrix [adapters, parameters], and where each A and B begins.

    Where all files have one layout in float32, each is read straight into its row.

    Args:
        adapters: with the same modules and shapes.

    Raises:
        BrokenAdapter: a tensor holds NaN or infinity.
    """
    headers = [read_header(folder / WEIGHTS_NAME) for folder, _ in adapters]
    modules = adapters[0][1].modules
    if all(_all_float32(h) and h.tensors == headers[0].tensors for h in headers):
        flat = torch.empty(len(adapters), headers[0].data_bytes // 4)
        for row, (folder, _), header in zip(flat, adapters, headers, strict=True):
            _read_into(row, folder / WEIGHTS_NAME, header)
        begin = {name: tensor.begin // 4 for name, tensor in headers[0].tensors.items()}
        return flat, {m.name: (begin[m.key_a], begin[m.key_b]) for m in modules}
    rows = []
    for folder, facts in adapters:
        factors = load_factors(folder, facts)
        rows.append(torch.cat([t.flatten() for m in modules for t in factors[m.name][:2]]))
    places, at = {}, 0
    for m in modules:
        places[m.name] = at, at + m.rank * m.fan_in
        at += m.rank * (m.fan_in + m.fan_out)
    return torch.stack(rows), places


def _all_float32(header: Header) -> bool:
    return all(tensor.dtype == "F32" for tensor in header.tensors.values())


def _view(data: torch.Tensor, tensor: TensorInfo) -> torch.Tensor:
    return data[tensor.begin // 4 : tensor.end // 4].view(tensor.shape)


def _read_into(data: torch.Tensor, path: Path, header: Header) -> None:
    """The file's data section into ``data``, contiguous float32 on the CPU; checked."""
    with path.open("rb", buffering=0) as file:
        file.seek(header.data_start)
        rest: Any = memoryview(data.numpy()).cast("B")  # type: ignore[arg-type]
        while rest:
            count = file.readinto(rest)
            if not count:
                raise BrokenAdapter(f"{path}: became shorter while it was read")
            rest = rest[count:]
    # One sum for all: only where it is no number, every tensor is looked at.
    if not torch.isfinite(data.sum()):
        _check_finite(path, {name: _view(data, t) for name, t in header.tensors.items()})


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise BrokenAdapter(
                f"{path}: {name} holds NaN or infinity",
                hint="leave this adapter out; its training diverged or the file is damaged",
            )


def save_adapter(
    folder: Path,
    deltas: Deltas,
    *,
    base: str,
    base_revision: str | None,
    task_type: str,
    dtype: str = "float32",
    all_modules: Collection[str] = (),
    fan_in_fan_out: bool = False,
) -> None:
    """Write ``deltas`` as a PEFT LoRA folder that adds exactly B·A (α = r everywhere).

    Args:
        folder: exists already.
        dtype: of the written tensors, ``float32``, ``float16`` or ``bfloat16``.
        all_modules, fan_in_fan_out: see :func:`save_config`.
    """
    tensors = {}
    for name, delta in deltas.items():
        a, b = factor_keys(name, delta.kind)
        tensors[a] = delta.a.to(DTYPES[dtype]).contiguous()
        tensors[b] = delta.b.to(DTYPES[dtype]).contiguous()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    save_config(
        folder,
        {name: delta.rank for name, delta in deltas.items()},
        base=base,
        base_revision=base_revision,
        task_type=task_type,
        all_modules=all_modules,
        fan_in_fan_out=fan_in_fan_out,
    )


def factor_keys(module: str, kind: str = "linear") -> tuple[str, str]:
    """What PEFT's files call the A and the B of ``module``."""
    key = f"{PREFIX}{module}.lora_"
    a, b = ("embedding_A", "embedding_B") if kind == "embedding" else _LINEAR_KEYS
    return key + a, key + b


def save_config(
    folder: Path,
    ranks: Mapping[str, int],
    *,
    base: str,
    base_revision: str | None,
    task_type: str,
    all_modules: Collection[str] = (),
    fan_in_fan_out: bool = False,
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
) -> None:
    """Write PEFT's config of adapters whose α is their rank: what they add is exactly B·A.

    Args:
        ranks: of each adapted module.
        all_modules: names of all the base's modules, adapted or not, so that targets can be
            written shortly where that means the same; without them every module is named in full.
        fan_in_fan_out: the base's matrices are transformers' Conv1D.
        bias, modules_to_save: as PEFT has them.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {exact_pattern(name, ranks): rank for name, rank in ranks.items() if rank != common}
    config: dict[str, Any] = {
        "alpha_pattern": others,
        "base_model_name_or_path": base,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(modules_to_save) or None,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "revision": base_revision,
        "target_modules": short_targets(ranks, all_modules),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def short_targets(modules: Collection[str], all_modules: Collection[str]) -> list[str] | str:
    """``target_modules`` for ``modules``: last parts of names where they mean just these.

    PEFT takes a target for every module whose name is it or ends in ``.`` and it; a short name
    that would catch a module of the base which is not adapted is written in full. Where even a
    full name would (``lm_head`` beside ``draft.lm_head``), the whole is a regular expression,
    which PEFT matches from end to end.
    """
    by_end: dict[str, set[str]] = {}
    for name in modules:
        by_end.setdefault(name.rsplit(".", 1)[-1], set()).add(name)
    targets: list[str] = []
    for end, names in by_end.items():
        caught = {m for m in all_modules if m == end or m.endswith(f".{end}")}
        if caught == names:
            targets.append(end)
            continue
        for name in sorted(names):
            if any(m.endswith(f".{name}") and m not in names for m in caught):
                return f"(?:{'|'.join(map(re.escape, sorted(modules)))})"
            targets.append(name)
    return sorted(targets)


def exact_pattern(name: str, modules: Collection[str]) -> str:
    """The key of ``rank_pattern`` that means ``name`` and no other of ``modules``.

    PEFT reads it as a regular expression for the end of a name; plainly written, ``lm_head`` is
    ``draft.lm_head``, too. Plain where that does no harm: older readers take nothing else.
    """
    last = name[-1:]
    plain = re.compile(rf"(.*\.)?({name})$") if re.fullmatch(r"[\w.-]+", name) else None
    others = (m for m in modules if len(m) >= len(name) and m[-1:] == last and m != name)
    if plain is None or any(plain.match(m) for m in others):
        return f"^{re.escape(name)}"
    return name
