"""A dynamic mixture's folder: experts, router and gates in PEFT's layout, written and read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import PEFT_TYPE, Dynamic, Expert, Router, parse_dynamic
from lorahub_registry.adapters.facts import PREFIX, read_config
from lorahub_registry.adapters.tensors import WEIGHTS_NAME
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters
from lorahub_registry.weights.files import DTYPES, short_targets
from lorahub_registry.weights.lowrank import Deltas, LowRank


@dataclass(frozen=True)
class Origin:
    """Where an expert came from; see :class:`~lorahub_registry.adapters.dynamic.Expert`."""

    name: str
    ref: str | None = None
    revision: str | None = None
    digest: str | None = None


def save_dynamic(
    folder: Path,
    experts: Sequence[Deltas],
    origins: Sequence[Origin],
    router: Router,
    tensors: Mapping[str, torch.Tensor],
    *,
    base: str,
    base_revision: str | None,
    task_type: str,
    dtype: str = "float32",
    all_modules: Collection[str] = (),
) -> Dynamic:
    """Write a dynamic mixture.

    Args:
        folder: exists already.
        experts: each one's deltas; on linear modules.
        tensors: the router's own, by their names in the base: ``model.layers.0.mixture.lora_gate``
            ([E, width], float32) and ``….lora_gate_bias`` ([E]), ``….lora_centroids``,
            ``MODULE.lora_prototypes`` ([E, fan_in]).
        dtype: of the experts; a router's tensors stay float32.

    Raises:
        IncompatibleAdapters: an expert sits on an embedding.
    """
    modules = sorted({name for deltas in experts for name in deltas})
    out: dict[str, torch.Tensor] = {PREFIX + k: v.float().contiguous() for k, v in tensors.items()}
    for name in modules:
        here = [deltas[name] for deltas in experts if name in deltas]
        if any(delta.kind != "linear" for delta in here):
            raise IncompatibleAdapters(
                f"{name} is an embedding: experts of a dynamic mixture sit on linear modules",
                hint="leave out the adapters that change it, or mix them with given coefficients",
            )
        a, b = torch.cat([d.a for d in here]), torch.cat([d.b for d in here], 1)
        out[f"{PREFIX}{name}.lora_A.weight"] = a.to(DTYPES[dtype]).contiguous()
        out[f"{PREFIX}{name}.lora_B.weight"] = b.to(DTYPES[dtype]).contiguous()
    made = Dynamic(
        tuple(_expert(o, d, modules) for o, d in zip(origins, experts, strict=True)), router
    )
    sums = expert_sums(made, out)
    made = replace(
        made,
        experts=tuple(replace(e, sha256=s) for e, s in zip(made.experts, sums, strict=True)),
    )
    made = replace(made, sha256=router_sum(made, out))
    save_file(out, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "mixture": made.dump(),
        "peft_type": PEFT_TYPE,
        "revision": base_revision,
        "target_modules": short_targets(modules, all_modules),
        "task_type": task_type,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return made


def _expert(origin: Origin, deltas: Deltas, modules: Sequence[str]) -> Expert:
    ranks = {name: deltas[name].rank if name in deltas else 0 for name in modules}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    return Expert(origin.name, common, pattern, origin.ref, origin.revision, origin.digest)


def read_dynamic(folder: Path) -> Dynamic:
    """What the config in ``folder`` says of its mixture.

    Raises:
        BrokenAdapter: it is no dynamic mixture, or a damaged one.
    """
    config = read_config(folder)
    where = str(folder / CONFIG_NAME)
    if config.peft_type != PEFT_TYPE:
        raise BrokenAdapter(f"{where}: a {config.peft_type}, no dynamic mixture")
    return parse_dynamic(config.raw.get("mixture"), where=where)


def load_dynamic(folder: Path) -> tuple[Dynamic, list[dict[str, LowRank]], dict[str, torch.Tensor]]:
    """(what it says, each expert's deltas, the router's tensors by name), float32 on the CPU.

    Raises:
        BrokenAdapter: tensors and config disagree, or are not those the router was made with.
    """
    dynamic = read_dynamic(folder)
    file = folder / WEIGHTS_NAME
    tensors = load_file(file)
    check_dynamic(dynamic, tensors, where=str(file))
    check_router(dynamic, tensors, where=str(file))
    experts: list[dict[str, LowRank]] = [{} for _ in dynamic.experts]
    router = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            ranks = dynamic.ranks_on(module)
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            parts = zip(value.float().split(ranks), b.float().split(ranks, 1), strict=True)
            for own, (part_a, part_b), rank in zip(experts, parts, ranks, strict=True):
                if rank:
                    own[module] = LowRank(part_a.contiguous(), part_b.contiguous())
        elif not name.endswith(".lora_B.weight"):
            router[name] = value.float()
    return dynamic, experts, router


def check_dynamic(dynamic: Dynamic, tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Whether a file's tensors are those that its config, and its router's training, speak of.

    Raises:
        BrokenAdapter: they are not, or the config has no SHA-256 of an expert; the message names
            the expert or the tensor.
    """
    experts = len(dynamic.experts)
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        side = {"lora_A.weight": 0, "lora_B.weight": 1}.get(name[-13:])
        other = key.replace(".lora_A.", ".lora_B.") if side == 0 else key.replace("_B.", "_A.")
        if side is not None and other not in tensors:
            raise BrokenAdapter(f"{where}: {name} stands alone, without its other factor")
        if value.dim() != (1 if name.endswith("_bias") else 2):
            raise BrokenAdapter(f"{where}: {name} is of shape {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise BrokenAdapter(
                f"{where}: {name} holds NaN or infinity",
                hint="train the gates again with a lower learning rate" if side is None else None,
            )
        if side is None and value.shape[0] != experts:
            raise BrokenAdapter(
                f"{where}: {name} is for {value.shape[0]} experts, and there are {experts}"
            )
        if side is not None and value.shape[side] != sum(dynamic.ranks_on(name[:-14])):
            raise BrokenAdapter(
                f"{where}: {name} has {value.shape[side]} ranks where its experts have "
                f"{sum(dynamic.ranks_on(name[:-14]))}"
            )
    for expert, found in zip(dynamic.experts, expert_sums(dynamic, tensors), strict=True):
        if expert.sha256 != found:
            raise BrokenAdapter(
                f"{where}: expert {expert.name} is not the one that the router was made with",
                hint=_AGAIN,
            )


def check_router(dynamic: Dynamic, tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Whether a file's router is the one that was written with its experts.

    Raises:
        BrokenAdapter: it is not.
    """
    if dynamic.sha256 != router_sum(dynamic, tensors):
        raise BrokenAdapter(
            f"{where}: its router is not the one that was written with its experts", hint=_AGAIN
        )


_AGAIN = "take the folder as it was published, or make the mixture again"


def router_sum(dynamic: Dynamic, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of what decides: the router's own tensors, what its config says, whom it chooses."""
    said = {"router": dynamic.dump()["router"], "experts": [e.sha256 for e in dynamic.experts]}
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    own = {k.removeprefix(PREFIX): v for k, v in tensors.items() if not _of_expert(k)}
    for name, value in sorted(own.items()):
        total.update(f"{name} {list(value.shape)}\n".encode())
        total.update(_bytes(value))
    return total.hexdigest()


def _of_expert(key: str) -> bool:
    return key.endswith((".lora_A.weight", ".lora_B.weight"))


def expert_sums(dynamic: Dynamic, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """SHA-256 of each expert's tensors in a mixture's file, whatever stands beside them.

    Of their values in float32: PEFT widens half precision as it loads, and saves it so.
    """
    sums = [hashlib.sha256() for _ in dynamic.experts]
    for key in sorted(k for k in tensors if k.endswith(".lora_A.weight")):
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
        ranks = dynamic.ranks_on(module)
        for total, rank, part_a, part_b in zip(
            sums, ranks, a.split(ranks), b.split(ranks, 1), strict=True
        ):
            if rank:
                total.update(f"{module} {rank}\n".encode())
                total.update(_bytes(part_a))
                total.update(_bytes(part_b))
    return [total.hexdigest() for total in sums]


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().float().contiguous().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
