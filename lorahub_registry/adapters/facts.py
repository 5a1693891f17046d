"""What an adapter is, from its config and its safetensors header: nothing is loaded.

The tensors decide: a module's rank is what its tensors have, and a config that says otherwise is
an error (:class:`BrokenAdapter`), because scaling is α/r and would be wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorahub_registry.adapters.config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    AdapterConfig,
    parse_config,
)
from lorahub_registry.adapters.mixlora import KINDS, parse_mixlora
from lorahub_registry.adapters.mixlora_keys import (
    OLD_PROJ,
    A,
    check_shapes,
    modern_names,
    parse_key,
)
from lorahub_registry.adapters.tensors import (
    PICKLE_NAME,
    WEIGHTS_NAME,
    Header,
    TensorInfo,
    content_digest,
    read_header,
)
from lorahub_registry.errors import BrokenAdapter, ForeignFormat, UnknownRef
from lorahub_registry.progress import Progress, silent

# base_model.model.<module>.lora_A[.<adapter name>].weight, and lora_embedding_A without .weight
_LORA_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.(?!weight\Z)[^.]+)?(?:\.weight)?\Z"
)
PREFIX = "base_model.model."


@dataclass(frozen=True)
class ModuleFacts:
    """One module that the adapter changes.

    Attributes:
        name: its dotted name in the base (``model.layers.0.self_attn.q_proj``).
        kind: ``linear``, ``embedding``, ``conv``, or ``experts``: a LoRA for each of them (MixLoRA
            and its kin), all of one shape.
        rank, fan_in, fan_out: of B [fan_out, rank] · A [rank, fan_in].
        scaling: α/r or α/√r.
        key_a, key_b: the tensors' names in the file; of experts, the first one's.
    """

    name: str
    kind: str
    rank: int
    fan_in: int
    fan_out: int
    scaling: float
    key_a: str
    key_b: str


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter, read without loading it.

    Attributes:
        weights: ``safetensors``, ``pickle`` (a ``.bin``, unread) or ``none``.
        modules: sorted by name; empty for unread weights and for kinds other than LoRA and
            MixLoRA, LoRAMoE, MoLA.
        other_tensors: names that are not a module's A or B: magnitudes, biases, saved modules,
            routers, and all experts but the first.
        parameters: how many numbers; None where unread.
        dtype: safetensors' name of the commonest dtype.
    """

    config: AdapterConfig
    weights: str
    modules: tuple[ModuleFacts, ...] = ()
    other_tensors: tuple[str, ...] = ()
    parameters: int | None = None
    dtype: str | None = None
    bytes: int | None = None

    @property
    def ranks(self) -> dict[int, int]:
        """Rank → how many modules have it, ascending."""
        return dict(sorted(Counter(m.rank for m in self.modules).items()))

    @property
    def rank(self) -> int | None:
        """The largest rank of any module; the config's where the tensors are unread."""
        return max(self.ranks, default=self.config.r)

    @property
    def targets(self) -> tuple[str, ...]:
        """Last parts of the adapted modules' names; the config's where the tensors are unread."""
        found = {m.name.rsplit(".", 1)[-1] for m in self.modules}
        said = self.config.targets
        if self.config.peft_type in KINDS:
            said = tuple(sorted(OLD_PROJ.get(name, name) for name in said))
        return tuple(sorted(found)) or said


def read_facts(folder: Path) -> AdapterFacts:
    """The adapter in ``folder``.

    Raises:
        UnknownRef: there is no ``adapter_config.json``.
        ForeignFormat, BrokenAdapter: see :mod:`.config` and :mod:`.tensors`.
    """
    config = read_config(folder)
    weights, pickle = folder / WEIGHTS_NAME, folder / PICKLE_NAME
    if weights.is_file():
        return facts_of(config, read_header(weights), where=str(weights))
    if pickle.is_file():
        return AdapterFacts(config, "pickle", bytes=pickle.stat().st_size)
    return AdapterFacts(config, "none")


def read_config(folder: Path) -> AdapterConfig:
    """The config in ``folder``, checked."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UnknownRef(f"{folder}: no {CONFIG_NAME} there, so no adapter")
    with path.open("rb") as file:
        return checked_config(file.read(MAX_CONFIG_BYTES + 1), where=str(path))


def checked_config(data: bytes | str, *, where: str) -> AdapterConfig:
    """The config in ``data``; of MixLoRA and its kin, with all that their own keys say.

    Raises:
        ForeignFormat, BrokenAdapter: see :mod:`.config` and :mod:`.mixlora`.
    """
    config = parse_config(data, where=where)
    if config.peft_type in KINDS:
        parse_mixlora(config.raw, where)
    return config


def facts_of(config: AdapterConfig, header: Header, *, where: str) -> AdapterFacts:
    """Facts from a config and a header, wherever they came from.

    Raises:
        BrokenAdapter: halves of a pair missing, or ranks other than the config's.
        ForeignFormat: a LoRA config beside tensors that are no LoRA's.
    """
    modules: tuple[ModuleFacts, ...] = ()
    others = tuple(sorted(header.tensors))
    if config.peft_type == "LORA":
        modules, others = _modules(config, header.tensors.values(), where)
        if not modules:
            some = ", ".join(list(header.tensors)[:2]) or "nothing"
            raise ForeignFormat(f"{where}: no lora_A / lora_B tensors in it (it holds {some})")
    elif config.peft_type in KINDS:
        modules, others = _experts(config, header.tensors, where)
    dtypes = Counter(t.dtype for t in header.tensors.values())
    return AdapterFacts(
        config,
        "safetensors",
        modules,
        others,
        parameters=sum(t.elements for t in header.tensors.values()),
        dtype=dtypes.most_common(1)[0][0] if dtypes else None,
        bytes=header.data_start + header.data_bytes,
    )


def digest_of(folder: Path, *, progress: Progress = silent) -> str | None:
    """The content digest of the adapter's tensors; None where it has no safetensors."""
    path = folder / WEIGHTS_NAME
    return content_digest(path, read_header(path), progress=progress) if path.is_file() else None


def find_adapters(root: Path) -> list[Path]:
    """Folders with an ``adapter_config.json`` at or below ``root``, sorted; hidden ones left out.

    Links to folders are not followed, so that a loop ends and nothing outside ``root`` is taken.
    """
    found = []
    for folder, below, files in root.walk() if hasattr(root, "walk") else _walk(root):
        below[:] = sorted(d for d in below if not d.startswith("."))
        if CONFIG_NAME in files:
            found.append(folder)
    return found


def _walk(root: Path) -> Iterable[tuple[Path, list[str], list[str]]]:
    import os  # Path.walk came with Python 3.12

    for folder, below, files in os.walk(root):
        yield Path(folder), below, files


def _modules(
    config: AdapterConfig, tensors: Iterable[TensorInfo], where: str
) -> tuple[tuple[ModuleFacts, ...], tuple[str, ...]]:
    sides: dict[str, dict[str, TensorInfo]] = {}
    kinds: dict[str, str] = {}
    others = []
    for tensor in tensors:
        match = _LORA_KEY.match(tensor.name)
        if not match or len(tensor.shape) < 2:
            others.append(tensor.name)
            continue
        module = match["module"]
        if match["side"] in sides.setdefault(module, {}):
            raise BrokenAdapter(f"{where}: {module} has lora_{match['side']} twice")
        sides[module][match["side"]] = tensor
        conv = len(tensor.shape) > 2
        kinds[module] = "embedding" if match["embedding"] else "conv" if conv else "linear"
    if not config.can_match(sides):
        raise BrokenAdapter(f"{where}: its patterns would take too long on {len(sides)} modules")
    modules = tuple(
        _module(config, name, kinds[name], sides[name], where) for name in sorted(sides)
    )
    return modules, tuple(sorted(others))


def _experts(
    config: AdapterConfig, tensors: Mapping[str, TensorInfo], where: str
) -> tuple[tuple[ModuleFacts, ...], tuple[str, ...]]:
    """Modules of a MixLoRA and its kin, named as in the bases that m-LoRA knows."""
    mix = parse_mixlora(config.raw, where)
    names = modern_names(tensors, mix)
    shapes = {native: tensors[name].shape for name, native in names.items()}
    check_shapes(mix, shapes, where)
    stored = {native: name for name, native in names.items()}
    found: list[ModuleFacts] = []
    taken: set[str] = set()
    for native, shape in shapes.items():
        key = parse_key(native, mix)
        if key is None or key.leaf != A or key.expert:
            continue
        part = mix.attention if key.expert is None else mix.experts
        other = native.removesuffix("A.weight") + "B.weight"
        pair = stored[native], stored[other]
        taken.update(pair)
        module = f"model.layers.{key.layer}.{key.place}"
        kind = "linear" if key.expert is None else "experts"
        sizes = shape[0], shape[1], shapes[other][0]
        found.append(ModuleFacts(module, kind, *sizes, part.scaling, *pair))
    others = tuple(sorted(tensors.keys() - taken))
    return tuple(sorted(found, key=lambda m: m.name)), others


def _module(
    config: AdapterConfig, name: str, kind: str, sides: Mapping[str, TensorInfo], where: str
) -> ModuleFacts:
    if missing := {"A", "B"} - sides.keys():
        raise BrokenAdapter(f"{where}: {name} has no lora_{missing.pop()}")
    a, b = sides["A"], sides["B"]
    rank = a.shape[0]
    if b.shape[1] != rank or rank < 1:
        raise BrokenAdapter(f"{where}: {name}: lora_A {a.shape} and lora_B {b.shape} do not fit")
    said = config.rank_of(name)
    if said is not None and said != rank:
        raise BrokenAdapter(
            f"{where}: {name} has rank {rank}, but adapter_config.json says {said}",
            hint="the scaling α/r would be wrong; take config and tensors from one save",
        )
    return ModuleFacts(
        name, kind, rank, a.shape[1], b.shape[0], config.scaling_of(name, rank), a.name, b.name
    )
