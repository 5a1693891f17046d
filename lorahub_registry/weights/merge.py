"""Adapters merged into a model's own weights, shard by shard: what changes which tensor, and how.

A merged model has the base's files, names and types; tensors that no adapter touches are copied bit
by bit. Of tied parameters each end may change in its own way, as in PEFT's unmerged model: then the
output holds both, and its config says that they are no longer tied.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorahub_registry.adapters.facts import ModuleFacts
from lorahub_registry.errors import BaseModelError, BrokenAdapter, IncompatibleAdapters
from lorahub_registry.weights.merged import Change, Merged
from lorahub_registry.weights.stream.adapter import AdapterFile
from lorahub_registry.weights.stream.checkpoint import Checkpoint
from lorahub_registry.weights.stream.rewrite import Rewrite, copied
from lorahub_registry.weights.stream.shards import Planned, same_layout
from lorahub_registry.weights.stream.skeleton import Skeleton, read_skeleton

_TYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.[^.]+)*\Z")
_BIAS = re.compile(r"(.+)\.lora_B(?:\.[^.]+)?\.bias\Z")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.[^.]+\Z)")
_UNQUANTISED = "merge into the model as it was before it was quantised, and quantise the result"


@dataclass(frozen=True)
class Plan:
    """What a merge writes.

    Attributes:
        layout: file → tensors; the base's, and what is no longer tied.
        changes: tensor of the output → (tensor of the base, what is done to it; None: nothing).
        config: the output's config.json where it is not the base's.
        untied: names of parameters that were one and are not any more.
        dtype: of most of the tensors that change.
    """

    layout: Mapping[str, Sequence[Planned]]
    changes: Mapping[str, tuple[str, Change | None]]
    config: Mapping[str, Any] | None
    untied: tuple[str, ...]
    dtype: str

    def rewrites(
        self, source: Checkpoint, adapters: Sequence[AdapterFile], device: str = "cpu"
    ) -> list[Rewrite]:
        """The output's tensors, as :func:`~.stream.rewrite.rewrite` takes them.

        Args:
            device: where those that change are computed.
        """
        found = []
        for tensors in self.layout.values():
            for tensor in tensors:
                origin, change = self.changes.get(tensor.name, (tensor.name, None))
                if change is None:
                    same = copied(source, origin)
                    found.append(Rewrite(tensor.name, same.blocks, same.make))
                else:
                    work = Merged(source, origin, change, adapters, device)
                    found.append(Rewrite(tensor.name, work.blocks, work.make, work.facts))
        return found

    def origin(self, name: str) -> str:
        """The base's tensor that a tensor of the output is made from."""
        return self.changes.get(name, (name, None))[0]


def plan(source: Checkpoint, adapters: Sequence[AdapterFile], *, base: str) -> Plan:
    """Which tensors change, by the base's config and the adapters' headers.

    Args:
        adapters: checked; more than one only where a sum of deltas expresses them all.
        base: its name, for messages.

    Raises:
        IncompatibleAdapters: a module that the base lacks or has in another shape; a tensor that
            it has no place for; ends of tied parameters that must be the same and would not be.
        BrokenAdapter: parts of DoRA or of ``modules_to_save`` that are missing.
        BaseModelError: the base is quantised, or not a model that transformers knows.
    """
    skeleton = read_skeleton(source.folder)
    if skeleton.quantization is not None:
        method = skeleton.quantization.get("quant_method", "its config says so")
        raise BaseModelError(f"{base} is quantised ({method})", hint=_UNQUANTISED)
    ends = _changes(skeleton, adapters, base)
    at = skeleton.stored(source.tensors)
    origins = {}
    for end in ends:
        first = skeleton.tied.get(end, end)
        if first not in at:
            raise BaseModelError(
                f"{base} stores no {first}, which the adapter changes", hint=_UNQUANTISED
            )
        origins[end] = at[first]
        _fits(source, at[first], end, ends[end], adapters, base)
    groups, config = _groups(skeleton), None
    if _torn(groups, ends):
        config, groups = _untied(source.folder, base, groups, ends)
    changes: dict[str, tuple[str, Change | None]] = {}
    layout, untied = same_layout(source), []
    for first, names in groups.items():
        root, change = skeleton.tied.get(first, first), ends.get(first)
        if root not in at:
            continue
        origin = at[root]
        there = [n for n in (_own(name, source) for name in names) if n is not None]
        if not there and config is not None:
            # It lay under its other end's name alone, and needs its own now.
            stored = source.tensors[origin]
            layout[stored.file.name].append(Planned(first, stored.dtype, stored.shape))
            changes[first] = origin, change
            untied.append(first)
        elif change is not None:
            changes |= dict.fromkeys(there or [origin], (origin, change))
    kinds = Counter(source.tensors[o].dtype for o in origins.values())
    return Plan(
        layout, changes, config, tuple(untied), str(kinds.most_common(1)[0][0]).split(".")[-1]
    )


def _changes(skeleton: Skeleton, adapters: Sequence[AdapterFile], base: str) -> dict[str, Change]:
    """Parameter, each end of a tied one by itself → what is done to it."""
    names = {**skeleton.shapes, **{o: skeleton.shapes[f] for o, f in skeleton.tied.items()}}
    parts: dict[str, list[tuple[int, str]]] = {}
    for i, adapter in enumerate(adapters):
        for module in adapter.modules.values():
            end = f"{module.name}.weight"
            _has(skeleton, names, adapter, module, end, base)
            if adapter.coefficient != 0:
                parts.setdefault(end, []).append((i, module.name))
    found = {}
    for end, there in parts.items():
        module_name = there[0][1]
        turned = skeleton.kinds[module_name] in {"conv1d", "embedding"}
        found[end] = Change(module_name, turned, tuple(there))
    if len(adapters) == 1 and adapters[0].coefficient == 1:
        _extras(adapters[0], names, _groups(skeleton), found, base)
    return found


def _has(
    skeleton: Skeleton,
    names: Mapping[str, Any],
    adapter: AdapterFile,
    module: ModuleFacts,
    end: str,
    base: str,
) -> None:
    kind = skeleton.kinds.get(module.name)
    if end not in names or kind is None:
        raise IncompatibleAdapters(
            f"{adapter.name} does not fit {base}: the base has no {module.name}",
            hint="the adapter was made for another base",
        )
    if kind == "other" or (kind == "embedding") != (module.kind == "embedding"):
        what = "no linear module" if kind == "other" else f"of kind {kind}"
        raise IncompatibleAdapters(
            f"{adapter.name} does not fit {base}: {module.name} is {module.kind} in the adapter "
            f"and {what} in the base",
            hint="the adapter was made for another base",
        )


def _extras(
    adapter: AdapterFile,
    names: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    found: dict[str, Change],
    base: str,
) -> None:
    """Add what an adapter changes beside its B·A: DoRA, biases, whole modules."""
    config, saved = adapter.facts.config, set()
    dora = set()
    for key in adapter.facts.other_tensors:
        bare = key.removeprefix("base_model.model.")
        if match := _MAGNITUDE.match(bare):
            if match[1] not in adapter.modules or not config.use_dora:
                raise BrokenAdapter(f"{adapter.path}: {key} belongs to no DoRA module of it")
            dora.add(match[1])
            ends, values = [f"{match[1]}.weight"], {"magnitude": key}
        elif match := _BIAS.match(bare):
            if match[1] not in adapter.modules or config.use_dora:
                raise IncompatibleAdapters(
                    f"{adapter.name}: holds {key}, which cannot be merged with DoRA or alone"
                )
            factor = adapter.modules[match[1]].scaling
            ends, values = [f"{match[1]}.bias"], {"added": (key, factor)}  # type: ignore[dict-item]
        else:
            end, values = _WRAPPED.sub("", bare), {"whole": key}
            own = [m for m in config.modules_to_save if f".{m}." in f".{end}"]
            saved |= set(own)
            # PEFT copies a module that it saves; any other tensor goes into the base itself,
            # where tied ones are one.
            ends = [end] if own else next((list(g) for g in groups.values() if end in g), [end])
        for one in ends:
            if one not in names:
                raise IncompatibleAdapters(
                    f"{adapter.name}: holds {key}, for which {base} has no place",
                    hint="the adapter was made for another base"
                    if "lora_B" not in key
                    else "give the base a bias of zeros there, or leave this adapter out",
                )
            old = found.get(one) or Change(one.rpartition(".")[0])
            found[one] = Change(**{**old.__dict__, **values})
    if lacking := sorted(set(config.modules_to_save) - saved):
        raise BrokenAdapter(
            f"{adapter.path}: holds nothing of {lacking[0]}, which modules_to_save names",
            hint="take config and tensors from one save",
        )
    if config.use_dora and (plain := sorted(adapter.modules.keys() - dora)):
        raise BrokenAdapter(
            f"{adapter.path}: use_dora is on, and {plain[0]} has no lora_magnitude_vector",
            hint="take config and tensors from one save",
        )


def _fits(
    source: Checkpoint,
    name: str,
    end: str,
    change: Change,
    adapters: Sequence[AdapterFile],
    base: str,
) -> None:
    stored = source.tensors[name]
    if stored.dtype not in _TYPES:
        raise BaseModelError(
            f"{base} is quantised: {name} is {stored.info.dtype}", hint=_UNQUANTISED
        )

    def check(who: AdapterFile, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if shape != wanted:
            raise IncompatibleAdapters(
                f"{who.name} does not fit {base}: {end} is {'x'.join(map(str, shape))} in the "
                f"adapter and {'x'.join(map(str, wanted))} in the base",
                hint="the adapter was made for another base, or tokens were added to it",
            )

    for i, module in change.parts:
        facts = adapters[i].modules[module]
        shape = (facts.fan_out, facts.fan_in)
        check(adapters[i], shape[::-1] if change.turned else shape, stored.shape)
    if change.whole is not None:
        check(adapters[0], adapters[0].shape(change.whole), stored.shape)
    if change.added is not None:
        check(adapters[0], adapters[0].shape(change.added[0]), stored.shape)
    if change.magnitude is not None:
        columns = stored.shape[1] if change.turned else stored.shape[0]
        check(adapters[0], adapters[0].shape(change.magnitude), (columns,))


def _groups(skeleton: Skeleton) -> dict[str, list[str]]:
    """First name → all names of a parameter."""
    found = {name: [name] for name in skeleton.shapes}
    for other, first in skeleton.tied.items():
        found[first].append(other)
    return found


def _torn(groups: Mapping[str, Sequence[str]], ends: Mapping[str, Change]) -> list[str]:
    """The first parameter whose ends change in different ways: its names."""
    return next((list(g) for g in groups.values() if len({ends.get(n) for n in g}) > 1), [])


def _untied(
    folder: Path, base: str, groups: Mapping[str, Sequence[str]], ends: Mapping[str, Change]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The config of the same model with untied embeddings, and what is tied in it still."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "config.json").write_text(json.dumps(config), "utf-8")
        after = _groups(read_skeleton(Path(made)))
    if torn := _torn(after, ends):
        raise IncompatibleAdapters(
            f"the adapter changes {sorted(n for n in torn if n in ends)[0]}, but not "
            f"{sorted(n for n in torn if n not in ends) or torn}: in {base} they are one tensor, "
            "and its architecture cannot have them apart",
            hint="use the adapter beside the base, unmerged",
        )
    return config, after


def _own(name: str, source: Checkpoint) -> str | None:
    """What the checkpoint calls this very name; it may leave out the head's prefix."""
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in range(min(3, len(parts) - 1)))
    return next((end for end in ends if end in source.tensors), None)
