"""What fits together, decided from files alone, before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorahub_registry.adapters.base_files import BaseFacts
from lorahub_registry.adapters.bases import BaseName
from lorahub_registry.adapters.config import CONFIG_NAME, REFUSED
from lorahub_registry.adapters.dynamic import FOLDER, PEFT_TYPE, folder_to_run, plain_instead
from lorahub_registry.adapters.facts import AdapterFacts
from lorahub_registry.adapters.mixlora import KINDS
from lorahub_registry.errors import IncompatibleAdapters

_LEAVE = "leave it out, or merge it into the base first"
_PLAIN = (
    "save it again as a plain LoRA: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
)
# PEFT saves these along with an adapter on embeddings or on the head.
_IN_BASE = re.compile(r"(embed_tokens|lm_head)\.(base_layer\.)?weight\Z")
_WHOLE = (
    "it is a whole tensor of the base; where it was not trained, save the adapter again with "
    "save_pretrained(…, save_embedding_layers=False)"
)


@dataclass(frozen=True)
class Member:
    """One adapter of a mixture, found and pinned.

    Attributes:
        name: what coefficients, tables and cards call it.
        key: what the registry calls it; may be a path, so it is never published.
        ref: what was asked for, pinned; never a path of this machine.
        folder: where its files are.
        base: the base it sits on, by name; None where nothing tells.
        base_digest: of the very base it was made for, where that was recorded.
        coefficient: given by the recipe; None where it is to be learned.
    """

    name: str
    key: str
    ref: str
    folder: Path
    facts: AdapterFacts
    base: str | None
    base_digest: str | None = None
    digest: str | None = None
    coefficient: float | None = None
    license: str | None = None
    revision: str = ""
    adapter_id: int | None = None


def check_weights(member: Member) -> None:
    """Whether it has weights that may be loaded.

    Raises:
        IncompatibleAdapters: it has none, or they are a pickle.
    """
    if member.facts.weights == "pickle":
        raise IncompatibleAdapters(
            f"{member.name}: its weights are a pickle ({member.key}), which is never loaded",
            hint=f"lorareg convert {member.key}",
        )
    if member.facts.weights == "none":
        raise IncompatibleAdapters(f"{member.name}: it has no weights ({member.key})")


def check_single(name: str, key: str, folder: Path, kind: str) -> None:
    """Whether it is one change for all tokens, and no MixLoRA, LoRAMoE or MoLA.

    Args:
        key: what a command may call it.

    Raises:
        IncompatibleAdapters: its experts differ from token to token.
    """
    if kind not in KINDS:
        return
    sides = "stand on both sides of the activation and " if kind == "MIXLORA" else ""
    hint = (
        f"run it as it is: lorareg generate {key} PROMPT, or PeftModel.from_pretrained after "
        '"import lorahub_registry.runtime"'
    )
    if folder.name == FOLDER and (folder.parent / CONFIG_NAME).is_file():
        hint += f"; its plain LoRA, another model, stands beside it: {folder.parent}"
    raise IncompatibleAdapters(
        f"{name}: it is {kind}: its experts {sides}differ from token to token, so that it cannot "
        "be merged, resized or summed",
        hint=hint,
    )


def plain_taken(members: Sequence[Member], done: str) -> list[str]:
    """Whose plain LoRA is taken in place of a mixture that decides, one sentence each.

    Args:
        done: what is done with it, as ``merged``.
    """
    return [
        f"{m.name}: what is {done} is its plain LoRA with fixed coefficients, another model than "
        f"the mixture in {FOLDER}/, which decides while it runs"
        for m in members
        if folder_to_run(m.folder) != m.folder
    ]


def check_sum(members: Sequence[Member]) -> None:
    """Whether a weighted sum of deltas expresses every member exactly.

    Raises:
        IncompatibleAdapters: names the first that does not fit, and why; or two members, and the
            module whose shapes differ.
    """
    for member in members:
        config = member.facts.config
        check_single(member.name, member.key, member.folder, config.peft_type)
        check_weights(member)
        if config.peft_type == PEFT_TYPE:
            raise IncompatibleAdapters(
                f"{member.name}: it is {PEFT_TYPE}: its coefficients differ from token to token or "
                "from prompt to prompt, so that it cannot be merged, resized or summed",
                hint=plain_instead(member.folder),
            )
        if config.peft_type != "LORA":
            raise IncompatibleAdapters(
                f"{member.name}: it is {config.peft_type}, and only LoRA adapters can be summed",
                hint=_LEAVE,
            )
        if config.unsupported:
            feature, _, value = config.unsupported[0].partition("=")
            why = REFUSED.get(feature, f"it uses {feature}, which lorareg does not know")
            raise IncompatibleAdapters(
                f"{member.name}: {why}{f': {feature} is {value}' if value else ''}; "
                "a sum would be wrong",
                hint=_PLAIN if feature == "init_lora_weights" else _LEAVE,
            )
        for module in member.facts.modules:
            if module.kind == "conv":
                raise IncompatibleAdapters(
                    f"{member.name}: {module.name} is conv LoRA; only linear modules and "
                    "embeddings can be summed"
                )
        if others := member.facts.other_tensors:
            raise IncompatibleAdapters(
                f"{member.name}: holds {others[0]}, which no sum of deltas expresses",
                hint=_WHOLE if all(map(_IN_BASE.search, others)) else None,
            )
    _same_shapes(members)


def _same_shapes(members: Sequence[Member]) -> None:
    first: dict[str, tuple[Member, str]] = {}
    for member in members:
        for module in member.facts.modules:
            shape = f"{module.kind} {module.fan_out}x{module.fan_in}"
            other, there = first.setdefault(module.name, (member, shape))
            if shape != there:
                raise IncompatibleAdapters(
                    f"{other.name} and {member.name} cannot be mixed: {module.name} is {there} "
                    f"in the one and {shape} in the other",
                    hint="they were made for different bases; leave one out",
                )


def check_factors(members: Sequence[Member]) -> None:
    """Whether LoraHub's factor-wise product is defined: one rank, scaling and target set.

    Raises:
        IncompatibleAdapters: names two members and what differs.
    """
    first = members[0]
    modules = {m.name: m for m in first.facts.modules}
    for other in members[1:]:
        theirs = {m.name: m for m in other.facts.modules}
        differs = None
        if theirs.keys() != modules.keys():
            odd = sorted(theirs.keys() ^ modules.keys())[0]
            differs = f"only one of them adapts {odd}"
        else:
            for name, module in modules.items():
                if module.rank != theirs[name].rank:
                    differs = f"{name} has rank {module.rank} and {theirs[name].rank}"
                elif abs(module.scaling - theirs[name].scaling) > 1e-9:
                    differs = f"{name} is scaled by {module.scaling:g} and {theirs[name].scaling:g}"
                if differs:
                    break
        if differs:
            raise IncompatibleAdapters(
                f"{first.name} and {other.name} cannot be multiplied factor by factor: {differs}",
                hint="use method: {type: learn}, the exact sum, which takes any ranks and targets",
            )


def check_base(members: Sequence[Member], base: BaseFacts, *, allow: bool = False) -> list[str]:
    """Whether every member was made for ``base``: by digest, else by name and shapes.

    Args:
        allow: names and digests may differ (``allow_base: true``); shapes never.

    Returns:
        What ``allow`` let pass, one sentence each.

    Raises:
        IncompatibleAdapters: names the adapter and both bases.
    """
    passed = []
    for member in members:
        problem = _identity(member, base)
        if problem and not allow:
            try:
                _shapes(member, base)
            except IncompatibleAdapters as unfit:  # then nothing allows it
                raise IncompatibleAdapters(
                    f"{problem}, and its shapes tell the same: {unfit}",
                    hint="leave it out, or take the base that it was made for",
                ) from None
            raise IncompatibleAdapters(
                problem,
                hint=f"if you know that it is right: lorareg add {member.key} --base {base.name}, "
                "or allow_base: true in the recipe (the card will say so)",
            )
        if problem:
            passed.append(problem)
        _shapes(member, base)
    return passed


def _identity(member: Member, base: BaseFacts) -> str | None:
    if member.base_digest and base.digest:
        if member.base_digest == base.digest:
            return None
        return (
            f"{member.name} was made for other weights than {base.name}: the digest recorded "
            f"with it is {member.base_digest[:12]}, this base's is {base.digest[:12]}"
        )
    if member.base is None:
        return f"{member.name} does not say which base it was made for"
    if BaseName.parse(member.base).same_model(BaseName.parse(base.name)):
        return None
    return f"{member.name} was made for {member.base}, not for {base.name}"


def _shapes(member: Member, base: BaseFacts) -> None:
    modules = member.facts.modules
    # m-LoRA's files number layers and name projections: where those are, the loaded base says.
    named = member.facts.config.peft_type not in KINDS
    if named and base.shapes and modules and all(base.shape_of(m.name) is None for m in modules):
        raise IncompatibleAdapters(
            f"{member.name} does not fit {base.name}: the base has no {modules[0].name}",
            hint="the adapter was made for another base",
        )
    for module in member.facts.modules:
        shape = base.shape_of(module.name)
        # Packed 4- and 8-bit weights are flat or hold several numbers a byte: no shape to compare.
        if shape is None or len(shape) != 2 or shape[1] == 1:
            continue
        if sorted(shape) != sorted((module.fan_out, module.fan_in)):
            raise IncompatibleAdapters(
                f"{member.name} does not fit {base.name}: {module.name} is "
                f"{module.fan_out}x{module.fan_in} in the adapter and {shape[0]}x{shape[1]} in "
                "the base",
                hint="the adapter was made for another base",
            )
