"""Tensors of MixLoRA, LoRAMoE and MoLA by their names: m-LoRA's, of every age, and their shapes.

Native names, with D the hidden size, F the feed-forward's, E experts of rank r::

    mixlora.layers.{i}.self_attn.{proj}.lora_A.weight               [r, in]; lora_B [out, r]
    mixlora.layers.{i}.mlp.moe_gate.weight                          [E, D]
    mixlora.layers.{i}.mlp.{proj}.experts.{e}.lora_A.weight         [r, in]; lora_B [out, r]
    loramoe.layers.{i}.mlp.{proj}.moe_gate.weight                   [E, in], and experts as above
    mola.layers.{i}.{self_attn or mlp}.{proj}.moe_gate.weight       [E, in], and experts as above

Beside each ``lora_A`` DoRA has ``lora_magnitude_vector`` [out]. That name is this program's own:
m-LoRA never saved its magnitudes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorahub_registry.errors import BrokenAdapter

if TYPE_CHECKING:
    from lorahub_registry.adapters.mixlora import MixLora

A, B, GATE, MAGNITUDE = "lora_A.weight", "lora_B.weight", "moe_gate.weight", "lora_magnitude_vector"
INWARD = frozenset({"gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"})
"""Projections of the feed-forward whose input is the hidden state…"""
OUTWARD = frozenset({"down_proj", "fc2", "dense_4h_to_h"})
"""…and those whose output is."""
OLD_PROJ = {
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
    "w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj",
}  # fmt: skip
"""m-LoRA's first names of the feed-forward's projections → today's."""
_NATIVE = re.compile(
    r"(?P<prefix>mixlora|loramoe|mola)\.layers\.(?P<layer>0|[1-9]\d{0,4})\."
    r"(?P<part>self_attn|mlp)\.(?:(?P<proj>(?!experts\.|moe_gate\.)\w+)\."
    r"(?:experts\.(?P<expert>0|[1-9]\d{0,4})\.)?)?"
    r"(?P<leaf>lora_A\.weight|lora_B\.weight|moe_gate\.weight|lora_magnitude_vector)\Z",
    re.ASCII,
)
_ANY = re.compile(
    r"(?:mixlora\.|base_model\.model\.model\.|base_model\.model\.|model\.)?"
    r"layers\.(?P<layer>\d{1,5})\.(?P<rest>.+)\Z",
    re.ASCII,
)
_OLD_EXPERT = re.compile(r"experts\.(?P<expert>\d{1,5})\.(?P<proj>\w+)\.(?P<leaf>lora_.+)\Z")
_PLAIN = re.compile(r"self_attn\.(?P<proj>\w+)\.(?P<leaf>lora_.+)\Z")
_MLP = re.compile(r"mlp\.(?P<proj>\w+)\.(?P<leaf>.+)\Z")
_SHOWN = 8


@dataclass(frozen=True)
class Key:
    """A native name, taken apart.

    Attributes:
        proj: None for MixLoRA's gate, which is its layer's.
        expert: None for what is not an expert's.
        leaf: :data:`A`, :data:`B`, :data:`GATE` or :data:`MAGNITUDE`.
    """

    layer: int
    part: str
    proj: str | None
    expert: int | None
    leaf: str

    @property
    def place(self) -> str:
        """Its module under the layer."""
        return f"{self.part}.{self.proj}" if self.proj else self.part


def native_stem(layer: int | str, part: str, proj: str, prefix: str = "mixlora") -> str:
    """What the names of a module's tensors begin with, but for ``experts.{e}``.

    Args:
        part: ``self_attn`` or ``mlp``.
        prefix: ``mixlora``, ``loramoe`` or ``mola``.
    """
    return f"{prefix}.layers.{layer}.{part}.{proj}"


def gate_name(layer: int) -> str:
    """The name of MixLoRA's router in a layer."""
    return f"mixlora.layers.{layer}.mlp.{GATE}"


def parse_key(name: str, mix: MixLora) -> Key | None:
    """``name`` taken apart; None where a ``mix.kind`` has no such tensor."""
    match = _NATIVE.match(name)
    if match is None or match["prefix"] != mix.kind.lower():
        return None
    expert = None if match["expert"] is None else int(match["expert"])
    key = Key(int(match["layer"]), match["part"], match["proj"], expert, match["leaf"])
    if key.leaf == GATE:
        of_layer = mix.kind == "MIXLORA"
        fits = expert is None and (key.proj is None) == of_layer
    else:
        fits = key.proj is not None and (mix.kind != "MOLA" or expert is not None)
    routed = key.part == "mlp" or mix.kind == "MOLA"
    if not fits or (not routed and (expert is not None or key.leaf == GATE)):
        return None
    return key


def modern_names(names: Iterable[str], mix: MixLora) -> dict[str, str]:
    """Each name of a file → its native name.

    Of m-LoRA's first checkpoints: ``layers.{i}.gate.weight``, ``layers.{i}.experts.{e}.{p}``,
    ``w1 w2 w3`` for the feed-forward's projections, and plain LoRA of the feed-forward (in layers
    that ``sparse_step`` left without experts) under ``self_attn``. A name that is neither stays as
    it is: :func:`check_shapes` refuses it.

    Raises:
        BrokenAdapter: some are of the first layout and some of today's, or two are one.
    """
    found: dict[str, str] = {}
    old: list[str] = []
    new: list[str] = []
    for name in names:
        native, age = _modern(name) if mix.kind == "MIXLORA" else (name, None)
        found[name] = native
        if age is not None:
            (old if age == "old" else new).append(name)
    if old and new:
        raise BrokenAdapter(
            f"half of its tensors are named as m-LoRA's first checkpoints were ({_some(old, 2)}), "
            f"half as today's are ({_some(new, 2)})",
            hint="two saves got into one file: take it as it was saved",
        )
    first: dict[str, str] = {}
    for name, native in found.items():
        if (other := first.setdefault(native, name)) != name:
            raise BrokenAdapter(f"{other} and {name} both mean {native}")
    return found


def _modern(name: str) -> tuple[str, str | None]:
    """(native name, whether only the first layout or only today's has the given one)."""
    match = _ANY.match(name)
    if match is None:
        return name, None
    start, rest = f"mixlora.layers.{match['layer']}.", match["rest"]
    if rest == "gate.weight":
        return f"{start}mlp.{GATE}", "old"
    if found := _OLD_EXPERT.match(rest):
        proj = OLD_PROJ.get(found["proj"], found["proj"])
        return f"{start}mlp.{proj}.experts.{found['expert']}.{found['leaf']}", "old"
    if found := _PLAIN.match(rest):
        proj = OLD_PROJ.get(found["proj"], found["proj"])
        if proj in INWARD | OUTWARD:
            return f"{start}mlp.{proj}.{found['leaf']}", "old"
        return f"{start}{rest}", None
    if not name.startswith("mixlora."):
        return name, None
    if found := _MLP.match(rest):
        return name, "old" if found["proj"] in OLD_PROJ else "new"
    return name, None


def everywhere(mix: MixLora, names: Iterable[str]) -> bool:
    """Whether, by its tensors' native ``names``, a MixLoRA has a router in every layer."""
    keys = [key for name in names if (key := parse_key(name, mix))]
    layers = {key.layer for key in keys}
    return layers != set() and layers == {key.layer for key in keys if key.leaf == GATE}


def widths(mix: MixLora, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
    """(D, F): the hidden size and the feed-forward's; None where no tensor tells.

    Args:
        shapes: of native names that :func:`check_shapes` has taken.
    """
    hidden = inner = None
    for name, shape in shapes.items():
        key = parse_key(name, mix)
        if key is None or key.part != "mlp":
            continue
        if key.leaf == GATE and key.proj is None:
            hidden = shape[1]
        elif (key.leaf, key.proj in INWARD) in {(A, True), (B, False)} and _in_mlp(key):
            hidden = hidden or shape[1 if key.leaf == A else 0]
        elif key.leaf == A and key.proj in OUTWARD:
            inner = inner or shape[1]
        elif key.leaf == B and key.proj in INWARD:
            inner = inner or shape[0] // (2 if key.proj == "gate_up_proj" else 1)
    return hidden, inner


def _in_mlp(key: Key) -> bool:
    return key.proj in INWARD | OUTWARD


def check_shapes(mix: MixLora, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Whether tensors of these native names and shapes are what the config speaks of.

    Raises:
        BrokenAdapter: they are not; every reason by name, one a line.
    """
    keys = {name: parse_key(name, mix) for name in shapes}
    known = {key: (name, shapes[name]) for name, key in keys.items() if key is not None}
    stray = sorted(name for name, key in keys.items() if key is None)
    problems = [_stray(name, mix) for name in stray]
    if known:
        problems += [
            p for key, (name, shape) in known.items() for p in _shape(key, name, shape, mix)
        ]
        problems += _experts(mix, known)
        problems += _layers(mix, known)
        problems += _pairs(mix, known)
        if not problems:
            problems += _widths(known)
    elif not problems:
        problems = ["it holds no tensors"]
    if not problems:
        return
    problems = list(dict.fromkeys(problems))
    more = len(problems) - _SHOWN
    said = "".join(f"\n  {p}" for p in problems[:_SHOWN])
    raise BrokenAdapter(
        f"{where}: its tensors are not those of the {mix.kind} adapter that its config tells of:"
        + said + (f"\n  and {more} more" if more > 0 else ""),
        hint=_MAGNITUDES if _lost(mix, known) else "take config and tensors from one save",
    )  # fmt: skip


_MAGNITUDES = (
    "m-LoRA never saved DoRA's magnitudes: what was trained cannot be had back; take an adapter "
    "without use_dora, or train it again here"
)
Known = Mapping[Key, tuple[str, tuple[int, ...]]]


def _lost(mix: MixLora, known: Known) -> bool:
    dora = mix.experts.use_dora or mix.attention.use_dora
    return dora and not any(key.leaf == MAGNITUDE for key in known)


def _stray(name: str, mix: MixLora) -> str:
    prefix = name.partition(".")[0].upper()
    if prefix != mix.kind and prefix in {"MIXLORA", "LORAMOE", "MOLA"}:
        return f"{name} is of {prefix}, and peft_type says {mix.kind}"
    if name == "classifier":
        return "classifier is a classification head, which is trained with the base it sits on"
    return f"{name} is no tensor of a {mix.kind} adapter"


def _shape(key: Key, name: str, shape: tuple[int, ...], mix: MixLora) -> list[str]:
    found = []
    dims = 1 if key.leaf == MAGNITUDE else 2
    if len(shape) != dims or 0 in shape:
        return [f"{name} is of shape {list(shape)}, not of {dims} dimension{'s' * (dims > 1)}"]
    rank = {A: shape[0], B: shape[-1]}.get(key.leaf)
    routed = key.expert is not None
    said = (mix.experts if routed else mix.attention).r
    if rank is not None and rank != said:
        which = "the experts' r" if routed and mix.experts != mix.attention else "r"
        found.append(f"{name} has rank {rank}, and the config says {said} ({which})")
    if key.proj is not None and key.proj not in mix.target_modules:
        found.append(f"{key.place} has LoRA, and target_modules does not name {key.proj}")
    return found


def _experts(mix: MixLora, known: Known) -> list[str]:
    """What is wrong with how many experts there are."""
    held: dict[tuple[int, str], set[int]] = defaultdict(set)
    counts: set[int] = set()
    for key, (_, shape) in known.items():
        if key.expert is not None:
            held[key.layer, key.place].add(key.expert)
        elif key.leaf == GATE and len(shape) == 2:
            counts.add(shape[0])
    counts |= {len(experts) for experts in held.values() if experts == set(range(len(experts)))}
    want = set(range(mix.num_experts))
    wrong = {at: experts for at, experts in held.items() if experts != want}
    if len(counts) == 1 and mix.num_experts not in counts:
        return [f"num_experts says {mix.num_experts}, and the tensors have {counts.pop()} experts"]
    problems = []
    for (layer, place), experts in sorted(wrong.items()):
        lacking, beyond = sorted(want - experts), sorted(experts - want)
        if lacking:
            problems.append(f"layer {layer}: {place} lacks {_numbers('expert', lacking)}")
        if beyond:
            problems.append(
                f"layer {layer}: {place} has {_numbers('expert', beyond)}, "
                f"and num_experts says {mix.num_experts}"
            )
    for key, (name, shape) in known.items():
        if key.leaf == GATE and len(shape) == 2 and shape[0] != mix.num_experts:
            problems.append(
                f"{name} is for {shape[0]} experts, and num_experts says {mix.num_experts}"
            )
    return problems


def _layers(mix: MixLora, known: Known) -> list[str]:
    """Layers that are missing, have other modules than the rest, or lack their gate."""
    places: dict[int, set[str]] = defaultdict(set)
    routed: dict[int, set[str]] = defaultdict(set)
    gates: dict[int, set[str]] = defaultdict(set)
    plain: dict[int, set[str]] = defaultdict(set)
    for key in known:
        if key.leaf == GATE:
            gates[key.layer].add(key.place)
            continue
        places[key.layer].add(key.place)
        if key.expert is not None:
            routed[key.layer].add("mlp" if mix.kind == "MIXLORA" else key.place)
        elif key.part == "mlp":
            plain[key.layer].add(key.place)
    full = all(layer in gates for layer in places)
    layers = sorted({*places, *gates})
    problems = []
    if holes := sorted(set(range(layers[-1] + 1)) - set(layers)):
        problems.append(f"there are no tensors of {_numbers('layer', holes)}")
    common: set[str] = set().union(*places.values())
    for layer in layers:
        if lacking := common - places[layer]:
            problems.append(f"layer {layer} has no LoRA of {', '.join(sorted(lacking))}")
        expected = {"mlp"} if mix.kind == "MIXLORA" else routed[layer]
        if not (full or mix.has_experts(layer)):
            if routed[layer] | gates[layer]:
                problems.append(f"layer {layer} has experts, and by sparse_step it has none")
            continue
        for place in sorted((expected | routed[layer]) - gates[layer]):
            problems.append(f"layer {layer}: {place} has no {GATE}")
        for place in sorted(gates[layer] - expected):
            problems.append(f"layer {layer}: {place} has a {GATE} and no experts")
        for place in sorted(plain[layer]):
            problems.append(f"layer {layer}: {place} has plain LoRA where experts should be")
    return problems


def _pairs(mix: MixLora, known: Known) -> list[str]:
    """Halves that are missing, and magnitudes."""
    leaves: dict[tuple[int, str, str | None, int | None], dict[str, str]] = defaultdict(dict)
    for key, (name, _) in known.items():
        if key.leaf != GATE:
            leaves[key.layer, key.part, key.proj, key.expert][key.leaf] = name
    problems = []
    for (_, _, _, expert), here in leaves.items():
        part = mix.experts if expert is not None else mix.attention
        name = next(iter(here.values()))
        stem = name[: -len(next(iter(here)))]
        if {A, B} & here.keys() != {A, B}:
            missing = sorted({A, B} - here.keys())
            problems += [f"{stem}{leaf} is missing" for leaf in missing]
        if part.use_dora and MAGNITUDE not in here:
            problems.append(f"{stem}{MAGNITUDE} is missing, and use_dora is on")
        if not part.use_dora and MAGNITUDE in here:
            problems.append(f"{here[MAGNITUDE]} is there, and use_dora is off")
    return problems


def _widths(known: Known) -> list[str]:
    """Whether all that have to be as wide as each other are; ranks and pairs are right already."""
    problems = []
    sides: dict[tuple[int, str], dict[str, tuple[int, str]]] = defaultdict(dict)
    hidden: tuple[int, str] | None = None
    for key, (name, shape) in sorted(known.items(), key=lambda item: item[1][0]):
        side, width = ("in", shape[1]) if key.leaf in {GATE, A} else ("out", shape[0])
        if key.proj is not None:
            first = sides[key.layer, key.place].setdefault(side, (width, name))
            if first[0] != width:
                problems.append(
                    f"{first[1]} and {name} belong to one module, and one is {first[0]} wide, "
                    f"the other {width}"
                )
        outer = key.proj is None or key.proj in (INWARD if side == "in" else OUTWARD)
        if key.part == "mlp" and outer:
            hidden = hidden or (width, name)
            if hidden[0] != width:
                problems.append(
                    f"{hidden[1]} is for a hidden size of {hidden[0]}, {name} of {width}"
                )
    return problems


def _numbers(noun: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"{noun}{'s' * (len(numbers) > 1)} {shown}{', …' if len(numbers) > 5 else ''}"


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:count])
