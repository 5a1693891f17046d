"""``adapter_config.json`` of every age of PEFT, read as untrusted data.

Other tools write files of the same name. They are refused by the name of their format
(:class:`ForeignFormat`); damaged or hostile values by what is wrong (:class:`BrokenAdapter`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from lorahub_registry.errors import BrokenAdapter, ForeignFormat

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16

# A repeated group, as in (a+)+, is what makes a regular expression take for ever; so do many
# repeats, options or choices in a row: a?a?a?…aaa, (a|aa)(a|aa)…. PEFT's own patterns need neither.
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_REPEATED_GROUP = re.compile(r"\)\s*[*+{?]|\(\?(?![:=!<])")
_REPEAT = re.compile(r"[*+]|(?<!\()\?|\{\d*,")
_MAX_REPEATS = _MAX_GROUPS = 3
_MAX_STEPS = 1e9  # some seconds
PEFT_ALPHA = 8.0  # what PEFT takes for a config without lora_alpha

REFUSED = {
    "use_dora": "DoRA scales the whole weight (use_dora), which no sum of deltas expresses",
    "bias": "it changes the base's biases, which are no low-rank deltas",
    "lora_bias": "it adds a bias of its own (lora_bias), which is no low-rank delta",
    "modules_to_save": "it replaces whole modules (modules_to_save)",
    "trainable_token_indices": "it replaces single tokens' embeddings (trainable_token_indices)",
    "target_parameters": "it changes bare parameters, not modules (target_parameters)",
    "init_lora_weights": "its training started by changing the base's weights, so that its delta "
    "is not to the base",
    "layer_replication": "it sits on a base with repeated layers (layer_replication)",
    "use_qalora": "QA-LoRA pools the module's input (use_qalora)",
    "use_bdlora": "BD-LoRA's factors are block-diagonal (use_bdlora)",
    "alora_invocation_tokens": "aLoRA acts on some tokens only (alora_invocation_tokens)",
    "arrow_config": "Arrow chooses adapters token by token (arrow_config)",
    "kasa_config": "KaSA changes the base's weights and adds a diagonal (kasa_config)",
    "monteclora_config": "MonteCLoRA samples its factors (monteclora_config)",
    "velora_config": "VeLoRA keeps a state beside the factors (velora_config)",
    "enable_lora": "it is a merged LoRA of PEFT before 0.3 (enable_lora)",
}
"""What a sum of low-rank deltas does not express: the config's key → why."""
# These start from the base's own weights and change the base; their files only fit that one.
# save_pretrained(path_initial_model_for_weight_conversion=…) resets the key to true.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|lora_ga|loftq")


@dataclass(frozen=True)
class AdapterConfig:
    """What an ``adapter_config.json`` says, checked, with PEFT's names.

    Attributes:
        peft_type: upper case, ``LORA`` for nearly all.
        r: the default rank; None for kinds that have none.
        targets: module names; empty where they are a regular expression or left to PEFT.
        target_regex: where ``target_modules`` is one string; kept, never run.
        unsupported: features that change the arithmetic and are on, by name (``use_dora``…).
        raw: the whole file.
    """

    peft_type: str
    task_type: str | None = None
    base: str | None = None
    base_revision: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    targets: tuple[str, ...] = ()
    target_regex: str | None = None
    modules_to_save: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, module: str) -> int | None:
        """The rank that the config gives ``module`` (its dotted name in the base)."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha that the config gives ``module``."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.lora_alpha)
        return PEFT_ALPHA if alpha is None else float(alpha)

    def scaling_of(self, module: str, rank: int) -> float:
        """What the product B·A is multiplied by: α/r, or α/√r with rsLoRA (arXiv:2312.03732)."""
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def can_match(self, modules: Collection[str]) -> bool:
        """Whether its patterns can be tried on all of ``modules`` within seconds."""
        exponents = [_repeats(p) for p in (*self.rank_pattern, *self.alpha_pattern)]
        lengths = Counter(map(len, modules))
        steps = sum(count * n**e for n, count in lengths.items() for e in exponents)
        return steps <= _MAX_STEPS


def parse_config(data: bytes | str, *, where: str) -> AdapterConfig:
    """Read an ``adapter_config.json``.

    Args:
        data: the file's content.
        where: which file, for messages.

    Raises:
        ForeignFormat: some other tool's file; the message names which.
        BrokenAdapter: not JSON, or a value that no PEFT could have meant.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise BrokenAdapter(f"{where}: larger than {MAX_CONFIG_BYTES} bytes, no adapter's config")
    try:
        raw = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BrokenAdapter(f"{where}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise BrokenAdapter(f"{where}: holds a {type(raw).__name__}, not an object")
    if not isinstance(raw.get("peft_type"), str):
        raise ForeignFormat(f"{where}: {_foreign(raw)}", hint="lorareg takes PEFT adapters")
    try:
        return _checked(raw)
    except ValueError as error:
        raise BrokenAdapter(f"{where}: {error}") from None


def _checked(raw: dict[str, Any]) -> AdapterConfig:
    targets, regex = _targets(raw.get("target_modules"))
    return AdapterConfig(
        peft_type=raw["peft_type"].upper().rpartition(".")[2],
        task_type=_text(raw, "task_type"),
        base=_text(raw, "base_model_name_or_path"),
        base_revision=_text(raw, "revision"),
        r=_rank("r", raw.get("r")),
        lora_alpha=_number("lora_alpha", raw.get("lora_alpha")),
        rank_pattern=_patterns(raw, "rank_pattern", _rank),
        alpha_pattern=_patterns(raw, "alpha_pattern", _number),
        use_rslora=_flag(raw, "use_rslora"),
        use_dora=_flag(raw, "use_dora"),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out"),
        bias=_text(raw, "bias") or "none",
        targets=targets,
        target_regex=regex,
        modules_to_save=_names(raw.get("modules_to_save"), "modules_to_save"),
        unsupported=_unsupported(raw),
        raw=raw,
    )


def _unsupported(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The features that are on and that a sum of low-rank deltas does not express."""
    on = []
    for key in REFUSED:
        value = raw.get(key)
        if key == "init_lora_weights":
            if isinstance(value, str) and _CHANGES_BASE.match(value.lower()):
                on.append(f"{key}={value}")
        elif key == "bias":
            if str(value or "none") != "none":
                on.append(f"{key}={value}")
        elif isinstance(value, list) if key == "enable_lora" else value:
            on.append(key)
    # A switch that a later PEFT brought may change anything.
    new = (k for k in raw if k.startswith("use_") and k not in {*REFUSED, "use_rslora"})
    on += sorted(key for key in new if raw[key])
    return tuple(on)


def _foreign(raw: Mapping[str, Any]) -> str:
    """Whose file it is, in words."""
    if "lora_parameters" in raw or "fine_tune_type" in raw or "adapter_path" in raw:
        return "an MLX (mlx-lm) adapter, not PEFT's"
    if "config" in raw and ("model_class" in raw or "model_name" in raw):
        return "an adapter of AdapterHub's 'adapters' library, not PEFT's"
    if "unet" in raw or "_class_name" in raw:
        return "a diffusers file, not PEFT's"
    keys = ", ".join(repr(k) for k in list(raw)[:4]) or "nothing"
    return f"not a PEFT adapter's config: no 'peft_type' (it has {keys})"


def _targets(value: Any) -> tuple[tuple[str, ...], str | None]:
    if isinstance(value, str):
        # One plain name is a list of one for PEFT's users; anything else is a regular expression.
        return ((value,), None) if re.fullmatch(r"[\w.-]+", value) else ((), value)
    if isinstance(value, dict):  # MixLoRA writes {"q_proj": true, …}
        return tuple(sorted(k for k, on in value.items() if on)), None
    return _names(value, "target_modules"), None


def _names(value: Any, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{key} is {_short(value)}, not a list of names")
    return tuple(sorted(set(value)))


def _patterns(
    raw: Mapping[str, Any], key: str, read: Callable[[str, Any], T | None]
) -> dict[str, T]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {_short(value)}, not an object")
    if str(raw["peft_type"]).upper().endswith("ADALORA"):
        return {}  # its rank_pattern is a mask by tensor, no rank by module
    found = {}
    for pattern in value:
        bare = _ESCAPED.sub("x", pattern)
        if (
            len(pattern) > 256
            or _REPEATED_GROUP.search(bare)
            or _repeats(pattern) > _MAX_REPEATS
            or bare.count("(") > _MAX_GROUPS
        ):
            raise ValueError(f"{key} holds {_short(pattern)}, a pattern that may never end")
        try:
            _compiled(pattern)
        except (re.error, OverflowError) as error:
            raise ValueError(f"{key} holds {_short(pattern)}: {error}") from None
        number = read(f"{key} of {_short(pattern)}", value[pattern])
        if number is None:
            raise ValueError(f"{key} of {_short(pattern)} is null, not a number")
        found[pattern] = number
    return found


def _repeats(pattern: str) -> int:
    return len(_REPEAT.findall(_ESCAPED.sub("x", pattern)))


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """``pattern`` at the end of a module's name, by PEFT's own rule."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that matches ``module``."""
    return next((p for p in patterns if _compiled(p).match(module)), module)


def _rank(key: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} is {_short(value)}, not a whole number")
    if not 1 <= value <= MAX_RANK:
        raise ValueError(f"{key} is {_short(value)}, not a rank between 1 and {MAX_RANK}")
    if value != int(value):
        raise ValueError(f"{key} is {_short(value)}, not a whole number")
    return int(value)


def _number(key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9:
        raise ValueError(f"{key} is {_short(value)}, not a number lorareg can use")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ValueError(f"{key} is {_short(value)}, neither true nor false")


def _text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > 4096 or re.search("[\0\ud800-\udfff]", value):
        raise ValueError(f"{key} is {_short(value)}, not a name")
    return value.strip() or None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
