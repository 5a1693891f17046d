"""What the Hub reads in a README: its YAML front matter, and the tags that follow from it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A\s*---[\r\n]+([\S\s]*?)[\r\n]+---(?:\r?\n|\Z)")
MAX_DEPTH = 32
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class BadCard(ValueError):
    """The front matter is not one YAML mapping."""


def front_matter(readme: str) -> str | None:
    """The text between the two `---` lines, None where there is none."""
    match = FRONT_MATTER.match(readme)
    return match.group(1) if match else None


def load_card(readme: str) -> dict[str, Any] | None:
    """The front matter as JSON-ready data, None where there is none. Aliases are refused."""
    text = front_matter(readme)
    if text is None:
        return None
    try:
        _require_tame(text)
        data = _plain(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError) as error:
        raise BadCard(f"YAML is not valid: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise BadCard("YAML must be a mapping")
    return data


def _require_tame(text: str) -> None:
    """Refuse what grows when it is loaded: aliases, and deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise BadCard("YAML aliases are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise BadCard("YAML is nested too deeply")


def card_data(readme: bytes | None) -> dict[str, Any] | None:
    """`cardData` as listings show it. A card that cannot be read is shown as none."""
    if readme is None:
        return None
    try:
        return load_card(readme.decode("utf-8", errors="replace"))
    except BadCard:
        return None


def _plain(value: Any) -> Any:
    """YAML values as JSON has them: dates are text, NaN and infinity are null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | set | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def problems(readme: str) -> tuple[list[str], list[str]]:
    """Errors and warnings, as `validate-yaml` (and a commit) reports them."""
    try:
        data = load_card(readme)
    except BadCard as error:
        return [str(error)], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    if not isinstance(data.get("tags", []), list):
        errors.append('"tags" must be an array')
    if not isinstance(data.get("license", ""), str | list):
        errors.append('"license" must be a string')
    for base in texts(data.get("base_model")):
        if not REPO_ID.fullmatch(base):
            errors.append(
                f'"base_model" with value "{base}" is not valid. '
                "Use a model id from https://hf.co/models."
            )
    return errors, []


def texts(value: Any) -> list[str]:
    """A field that may be one text or a list of them. Anything else in it is left out."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str)]


def library_of(card: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """`library_name` of the card; without one, `peft` where there is an adapter config."""
    stated = card.get("library_name")
    if isinstance(stated, str):
        return stated
    return "peft" if "adapter_config.json" in names else None


def relation_of(card: Mapping[str, Any], names: Iterable[str]) -> str:
    """How a model relates to its base: as stated, or as its files and library suggest."""
    stated = card.get("base_model_relation")
    if isinstance(stated, str):
        return stated
    adapter = library_of(card, names) == "peft" or "lora" in texts(card.get("tags"))
    return "adapter" if adapter else "finetune"


def tags_of(card: Mapping[str, Any], names: list[str], library: str | None) -> list[str]:
    """The tags of a listing: library, formats, then what the card says, prefixed by its field."""
    tags = texts(library)
    tags += [ending for ending in ("safetensors", "gguf") if any(n.endswith(ending) for n in names)]
    tags += texts(card.get("tags")) + texts(card.get("pipeline_tag"))
    tags += [f"dataset:{name}" for name in texts(card.get("datasets"))]
    tags += texts(card.get("language"))
    bases = texts(card.get("base_model"))
    tags += [f"base_model:{base}" for base in bases]
    tags += [f"base_model:{relation_of(card, names)}:{base}" for base in bases]
    tags += [f"license:{name}" for name in texts(card.get("license"))]
    return list(dict.fromkeys([*tags, "region:us"]))
