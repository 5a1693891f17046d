"""What the config of a MixLoRA, LoRAMoE or MoLA adapter says; nothing is loaded.

MixLoRA (arXiv:2404.15159) puts experts beside the feed-forward of every layer, each a LoRA of its
projections, and a router of one linear map before them. LoRAMoE (arXiv:2312.09979) and MoLA
(arXiv:2402.08562) give every module experts and a router of its own. Their files are m-LoRA's:
``adapter_config.json`` with these keys, and tensors named as :mod:`.mixlora_keys` has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from lorahub_registry.adapters.config import MAX_RANK
from lorahub_registry.adapters.mixlora_keys import OLD_PROJ, everywhere
from lorahub_registry.adapters.mixlora_keys import check_shapes as check_shapes
from lorahub_registry.adapters.mixlora_keys import modern_names as modern_names
from lorahub_registry.adapters.values import Values, short
from lorahub_registry.errors import BrokenAdapter

Kind = Literal["MIXLORA", "LORAMOE", "MOLA"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_EXPERTS = 4096

_MAX_TARGETS = 64  # a decoder layer has no more kinds of linear modules
_STRATEGIES = {
    "mixlora": "mixlora",
    "mixtral": "mixlora",
    "mixlora-dynamic": "mixlora-dynamic",
    "mixlora-switch": "mixlora-switch",
    "switch": "mixlora-switch",
    "loramoe": "loramoe",
    "mola": "mola",
}
_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "MIXLORA": ("mixlora", "mixlora-dynamic", "mixlora-switch"),
    "LORAMOE": ("loramoe",),
    "MOLA": ("mola",),
}


@dataclass(frozen=True)
class LoraPart:
    """One set of LoRA settings: the attention's, or the experts'."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by: α/r, or α/√r with rsLoRA (arXiv:2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class TopK:
    """The ``k`` likeliest experts of each token, their probabilities divided by their sum."""

    k: int


@dataclass(frozen=True)
class TopP:
    """The likeliest experts until their probabilities pass ``p``, the last one included.

    Attributes:
        temperature: divides the probabilities; 0 leaves them as they are.
    """

    p: float
    temperature: float = 0.0


@dataclass(frozen=True)
class Switch:
    """The likeliest expert, as long as it has room (arXiv:2101.03961).

    Attributes:
        capacity: how many tokens of a sequence an expert takes.
        dropout: of the feed-forward's output, while it trains (``ffn_dropout``).
        sparse_step: experts sit in layers with ``layer % sparse_step == 1`` only, and elsewhere
            plain LoRA does. m-LoRA's first checkpoints are so; its later ones state the number
            and have experts everywhere: see :func:`settled`.
    """

    capacity: int
    dropout: float = 0.0
    sparse_step: int | None = None


Routing = TopK | TopP | Switch | None
"""None: all experts, weighted by the softmax (LoRAMoE)."""


@dataclass(frozen=True)
class MixLora:
    """A mixture of LoRA experts.

    Attributes:
        attention: settings of what is plain LoRA; in MoLA nothing is.
        experts: settings of each expert: ``expert_lora`` over the outer ones.
        target_modules: sorted; last parts of the names of modules that have LoRA.
        act_fn: the feed-forward's activation; None: the base's own.
        router_loss: whether training adds the balancing loss.
        router_init_range: standard deviation of a new MixLoRA router; what LoRAMoE and MoLA pass
            to Kaiming's initialisation as the square of ``a``.
        revision: the base's commit, where it is known.
    """

    kind: Kind
    num_experts: int
    routing: Routing
    attention: LoraPart
    experts: LoraPart
    target_modules: tuple[str, ...]
    act_fn: str | None = None
    router_loss: bool = True
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.001
    router_init_range: float = 0.02
    jitter_noise: float = 0.0
    base: str | None = None
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"

    @property
    def strategy(self) -> str:
        """Its ``routing_strategy``, by today's name."""
        if self.kind != "MIXLORA":
            return self.kind.lower()
        return {TopK: "mixlora", TopP: "mixlora-dynamic", Switch: "mixlora-switch"}[
            type(self.routing)
        ]

    def has_experts(self, layer: int) -> bool:
        """Whether the decoder layer ``layer`` (from 0) has experts."""
        step = self.routing.sparse_step if isinstance(self.routing, Switch) else None
        return step is None or step == 1 or layer % step == 1


def parse_mixlora(raw: Mapping[str, Any], where: str) -> MixLora:
    """Read an ``adapter_config.json`` of one of :data:`KINDS`.

    A key that is null counts as absent, and unknown keys are left alone.

    Args:
        where: which file, for messages.

    Raises:
        BrokenAdapter: values that cannot be; all of them, one a line.
    """
    read = Values({k: v for k, v in raw.items() if v is not None})
    kind, strategy = _kind(read)
    plugged = kind != "MIXLORA"
    attention = _lora(read)
    experts = attention
    if not plugged and (inner := read.raw.get("expert_lora")) is not None:
        if isinstance(inner, Mapping):
            own = {k: v for k, v in inner.items() if v is not None}
            outer = {k: v for k, v in read.raw.items() if k in _LORA_KEYS}
            below = Values({**outer, **own}, "expert_lora's ")
            experts = _lora(below)
            read.problems += [p for p in below.problems if _says_own(p, own)]
        else:
            read.problems.append(f"expert_lora is {short(inner)}, not an object")
    num_experts = read.whole("num_experts", None, most=MAX_EXPERTS)
    switch = strategy == "mixlora-switch"
    found = MixLora(
        kind=kind,
        num_experts=num_experts,
        routing=_routing(read, strategy, num_experts),
        attention=attention,
        experts=experts,
        target_modules=_targets(read),
        act_fn=None if plugged else read.text("act_fn"),
        router_loss=False if kind == "LORAMOE" else read.flag("router_loss", default=not plugged),
        router_aux_loss_coef=read.number("router_aux_loss_coef", 0.001),
        router_z_loss_coef=read.number("router_z_loss_coef", 0.001),
        router_init_range=read.number("router_init_range", _init_range(kind, strategy)),
        jitter_noise=0.0 if plugged else read.number("jitter_noise", 0.01 if switch else 0.0),
        base=read.text("base_model_name_or_path"),
        revision=read.text("revision"),
        task_type=read.text("task_type"),
    )
    if read.problems:
        said = "".join(f"\n  {problem}" for problem in dict.fromkeys(read.problems))
        raise BrokenAdapter(
            f"{where}: as a {kind} adapter it says what cannot be:{said}",
            hint="correct these keys, or take the config that was saved with the tensors",
        )
    return found


def settled(mix: MixLora, names: Iterable[str]) -> MixLora:
    """``mix`` with the ``sparse_step`` that its tensors have.

    m-LoRA's later checkpoints may state one and still have experts in every layer; only its first
    ones followed it. The tensors decide.

    Args:
        names: native ones.
    """
    routing = mix.routing
    if isinstance(routing, Switch) and routing.sparse_step is not None and everywhere(mix, names):
        return replace(mix, routing=replace(routing, sparse_step=None))
    return mix


def to_config(mix: MixLora) -> dict[str, Any]:
    """The ``adapter_config.json`` of ``mix``: m-LoRA's keys, in its order.

    What m-LoRA reads and never writes (``router_aux_loss_coef``…) is there where it is not what a
    reader takes without it. No value is null.
    """
    out: dict[str, Any] = {"bias": "none", "peft_type": mix.kind}
    if mix.task_type is not None:
        out["task_type"] = mix.task_type
    if mix.base is not None:
        out["base_model_name_or_path"] = mix.base
    if mix.revision is not None:
        out["revision"] = mix.revision
    out |= _part(mix.attention)
    out["target_modules"] = list(mix.target_modules)
    if mix.experts != mix.attention:
        # What the outer settings switch on and the experts do not has to be said: they inherit.
        inherited = {k: False for k in ("use_dora", "use_rslora") if getattr(mix.attention, k)}
        out["expert_lora"] = {"bias": "none", **inherited, **_part(mix.experts)}
    out["routing_strategy"] = mix.strategy
    out["num_experts"] = mix.num_experts
    if mix.act_fn is not None:
        out["act_fn"] = mix.act_fn
    routing = mix.routing
    if isinstance(routing, TopK):
        out["top_k"] = routing.k
    elif isinstance(routing, TopP):
        out |= {"top_p": routing.p, "temperature": routing.temperature}
    elif isinstance(routing, Switch):
        out["expert_capacity"] = routing.capacity
        if routing.sparse_step is not None:
            out["sparse_step"] = routing.sparse_step
        if routing.dropout:
            out["ffn_dropout"] = routing.dropout
    plain = replace(
        mix,
        router_loss=mix.kind == "MIXLORA",
        router_aux_loss_coef=0.001,
        router_z_loss_coef=0.001,
        router_init_range=_init_range(mix.kind, mix.strategy),
        jitter_noise=0.01 if mix.strategy == "mixlora-switch" else 0.0,
    )
    was, now = asdict(plain), asdict(mix)
    return out | {key: now[key] for key in _SELDOM if now[key] != was[key]}


def differing(mix: MixLora, other: MixLora) -> list[str]:
    """What of ``other`` makes the same tensors compute something else than ``mix`` does: keys
    with both values, a clause each. What only training reads is left out."""
    ours, theirs = _running(mix), _running(other)
    return [
        f"{key} is {_value(theirs, key)} and not {_value(ours, key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _value(said: Mapping[str, Any], key: str) -> str:
    return short(said[key]) if key in said else "absent"


def _running(mix: MixLora) -> dict[str, Any]:
    routing = mix.routing
    if isinstance(routing, Switch):
        step = None if routing.sparse_step == 1 else routing.sparse_step
        routing = replace(routing, dropout=0.0, sparse_step=step)
    said = to_config(
        replace(
            mix,
            routing=routing,
            attention=replace(mix.attention, lora_dropout=0.0),
            experts=replace(mix.experts, lora_dropout=0.0),
            base=None,
            revision=None,
            task_type=None,
        )
    )
    return {key: value for key, value in said.items() if key not in _SELDOM}


_SELDOM = (
    "router_loss",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_init_range",
    "jitter_noise",
)
_LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "bias")


def _init_range(kind: Kind, strategy: str) -> float:
    if kind != "MIXLORA":
        return 5.0
    return 1.0 if strategy == "mixlora-switch" else 0.02


def _part(part: LoraPart) -> dict[str, Any]:
    on: dict[str, Any] = {k: True for k in ("use_dora", "use_rslora") if getattr(part, k)}
    whole = part.lora_alpha == int(part.lora_alpha)
    alpha = int(part.lora_alpha) if whole else part.lora_alpha
    return {**on, "r": part.r, "lora_alpha": alpha, "lora_dropout": float(part.lora_dropout)}


def _says_own(problem: str, own: Mapping[str, Any]) -> bool:
    """Whether it is about a key of its own: what is inherited was told already."""
    return any(f"expert_lora's {key} " in f"{problem} " for key in own)


def _kind(read: Values) -> tuple[Kind, str]:
    strategy = str(read.raw.get("routing_strategy", "")).lower()
    modern = _STRATEGIES.get(strategy)
    said = str(read.raw.get("peft_type", "")).upper().rpartition(".")[2]
    kind = next((k for k in KINDS if k == said or (not said and modern in _OF_KIND[k])), None)
    if kind is None:
        read.problems.append(f"peft_type is {short(said)}, none of {', '.join(KINDS)}")
        kind = "MIXLORA"
    if kind != "MIXLORA" and not strategy:
        modern = _OF_KIND[kind][0]
    if modern not in _OF_KIND[kind]:
        known = ", ".join(_OF_KIND[kind])
        saying = f"is {short(strategy)}" if strategy else "is missing"
        read.problems.append(f"routing_strategy {saying}; of {kind} it is one of {known}")
        modern = _OF_KIND[kind][0]
    return kind, modern or ""


def _lora(read: Values) -> LoraPart:
    if read.raw.get("bias", "none") != "none":
        read.problems.append(f"{read.of}bias is {short(read.raw['bias'])}: the format holds none")
    return LoraPart(
        r=read.whole("r", None, most=MAX_RANK),
        lora_alpha=read.number("lora_alpha", None, above=True),
        lora_dropout=read.number("lora_dropout", 0.0, most=1.0),
        use_dora=read.flag("use_dora", default=False),
        use_rslora=read.flag("use_rslora", default=False),
    )


def _routing(read: Values, strategy: str, experts: int) -> Routing:
    if strategy in {"mixlora", "mola"}:
        k = read.whole("top_k", 2, most=MAX_EXPERTS)
        counted = not any("num_experts " in problem for problem in read.problems)
        if k > experts and counted:
            read.problems.append(f"top_k is {k}, and num_experts is {experts}")
        return TopK(k)
    if strategy == "mixlora-dynamic":
        return TopP(
            read.number("top_p", 0.8, most=1.0, above=True), read.number("temperature", 0.0)
        )
    if strategy == "mixlora-switch":
        step = read.whole("sparse_step", 1) if "sparse_step" in read.raw else None
        capacity = read.whole("expert_capacity", 32)
        return Switch(capacity, read.number("ffn_dropout", 0.0, most=1.0), step)
    return None


def _targets(read: Values) -> tuple[str, ...]:
    value = read.raw.get("target_modules")
    if isinstance(value, Mapping):
        wrong = {k: v for k, v in value.items() if not isinstance(v, bool) and v is not None}
        value = wrong or [k for k, on in value.items() if on]
    elif isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        said = "is missing" if value is None else f"is {short(value)}"
        read.problems.append(
            f"target_modules {said}: a list of names, or an object of name: true or false"
        )
        return ()
    if not value or len(value) > _MAX_TARGETS:
        many = f"{len(value)} modules" if value else "no module that is on"
        read.problems.append(f"target_modules names {many}")
    return tuple(sorted({OLD_PROJ.get(v, v) for v in value}))
