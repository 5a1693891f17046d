"""The whole card: YAML front matter and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from lorahub_registry import resources
from lorahub_registry.adapters.experts import told
from lorahub_registry.card.front import holds_experts, is_converted, is_trained, metadata
from lorahub_registry.card.markdown import cell, code, fence, literal, option, plusminus, point
from lorahub_registry.errors import OutputError


def render(facts: Mapping[str, Any], recipe: str, *, repo: str | None = None) -> str:
    """The card of a mixture, composed or converted, or of a trained or converted adapter.

    Args:
        facts: what ``results.json`` holds.
        recipe: the YAML that made it, resolved: a recipe, or a factory of this one adapter; "" of
            what was converted.

    Raises:
        OutputError: a fact that the card needs is missing.
    """
    # Late: the recipe language takes a while to load, and few who import this room write cards.
    from lorahub_registry.recipes.template import PRESETS

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.folder("cards")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown: cells go through the filter below
    )
    environment.filters |= {"cell": cell, "code": code, "fence": fence, "literal": literal}
    environment.filters |= {"option": option, "plusminus": plusminus, "point": point}
    template = "adapter" if is_trained(facts) else "mixture"
    if is_converted(facts):
        template = "experts" if holds_experts(facts) else "converted"
    try:
        more = {"rows": told(facts["experts"])} if holds_experts(facts) else {}
        body = environment.get_template(f"{template}.md.jinja").render(
            **facts,
            recipe=recipe.rstrip("\n"),
            repo=repo or f"OWNER/{facts['name']}",
            presets=PRESETS,
            **more,
        )
        front = metadata(facts)
    except jinja2.TemplateError as error:
        raise OutputError(f"README.md, the card, cannot be written: {error}") from None
    except KeyError as error:
        what = f"{error} is not in its results"
        raise OutputError(f"README.md, the card, cannot be written: {what}") from None
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    return f"---\n{head}---\n\n{body}"
