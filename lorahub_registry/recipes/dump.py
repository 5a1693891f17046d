"""From a :class:`Recipe` to text and to a digest: the same recipe gives the same of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml

from lorahub_registry.recipes.model import Recipe
from lorahub_registry.recipes.yamltext import scalar


class _Dumper(yaml.SafeDumper):
    """YAML without anchors, its texts quoted where a reader might take them for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes what YAML 1.1 would misread; what YAML 1.2 would misread is quoted here.
    style = None if isinstance(scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def plain(recipe: Recipe) -> dict[str, Any]:
    """``recipe`` as plain data, defaults filled in, what is not set left out."""
    return recipe.model_dump(mode="json", exclude_none=True)


def to_yaml(recipe: Recipe) -> str:
    """``recipe`` as YAML, every default written out, keys always in the same order.

    :func:`~lorahub_registry.recipes.parse` of it equals ``recipe``.
    """
    return dumped(plain(recipe))


def dumped(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, in its own order."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=100,
    )


def digest(recipe: Recipe) -> str:
    """The sha256 of ``recipe``'s canonical JSON, as 64 hex digits.

    Recipes that mean the same have the same digest, however they are written.
    """
    canonical = json.dumps(plain(recipe), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
