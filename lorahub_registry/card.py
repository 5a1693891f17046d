"""From facts to a README.md: the card of a mixture, as the Hub shows it.

Facts come from a mixture's own files (``results.json``, ``recipe.yaml``); the template is
``cards/mixture.md.jinja``. Whatever is shown is escaped, and a missing fact is an error, not a gap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from lorahub_registry import resources
from lorahub_registry.errors import OutputError

RESULTS_NAME = "results.json"
RECIPE_NAME = "recipe.yaml"
TRACE_NAME = "trace.png"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9._-]*\Z")


def read_results(folder: Path) -> dict[str, Any]:
    """The facts beside a mixture.

    Raises:
        OutputError: there are none: no mixture, or not a whole one.
    """
    path = folder / RESULTS_NAME
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise OutputError(
            f"{folder} holds no {RESULTS_NAME}, so it is no mixture of lorareg",
            hint="cards are written for what `lorareg compose` made",
        ) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict) or "members" not in found:
        raise OutputError(f"{path}: not the results of a mixture")
    return found


def write_card(folder: Path, *, repo: str | None = None) -> Path:
    """Write ``README.md`` into a mixture's folder, from its other files.

    Args:
        repo: the Hub id it will have, for the code that loads it.

    Raises:
        OutputError: the folder holds no whole mixture.
    """
    path, facts = folder / "README.md", read_results(folder)
    try:
        recipe = (folder / RECIPE_NAME).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{folder / RECIPE_NAME}: cannot be read ({error})") from None
    path.write_text(render(facts, recipe, repo=repo), encoding="utf-8")
    return path


def is_generated(folder: Path) -> bool:
    """Whether the card in ``folder`` is as it was generated, for whatever repo; or is missing."""
    path = folder / "README.md"
    if not path.is_file():
        return True
    text = path.read_text("utf-8", errors="replace")
    named = re.search(r'from_pretrained\(base, "([^"]*)"\)', text)
    recipe = (folder / RECIPE_NAME).read_text("utf-8")
    return named is not None and text == render(read_results(folder), recipe, repo=named[1])


def render(facts: Mapping[str, Any], recipe: str, *, repo: str | None = None) -> str:
    """The whole card: YAML front matter and Markdown.

    Args:
        facts: what ``results.json`` holds.
        recipe: the resolved recipe's YAML.

    Raises:
        OutputError: a fact that the template needs is missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.folder("cards")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown: cells go through the filter below
    )
    environment.filters |= {"cell": cell, "code": code, "fence": fence, "literal": literal}
    environment.filters["plusminus"] = plusminus
    try:
        body = environment.get_template("mixture.md.jinja").render(
            **facts, recipe=recipe.rstrip("\n"), repo=repo or f"OWNER/{facts['name']}"
        )
    except (jinja2.TemplateError, KeyError) as error:
        raise OutputError(f"README.md, the card, cannot be written: {error}") from None
    front = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True, width=100)
    return f"---\n{front}---\n\n{body}"


def metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The front matter, in the Hub's own words."""
    base = facts["base"]["name"]
    pipeline = "text2text-generation" if facts["seq2seq"] else "text-generation"
    found: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": pipeline,
        "tags": ["lora", "lorareg", "merge", f"base_model:adapter:{base}"],
    }
    if facts["license"]:
        found["license"] = license_id(facts["license"])
    if facts["datasets"]:
        found["datasets"] = list(facts["datasets"])
    if facts.get("test"):
        mixture = next(row for row in facts["test"] if row["kind"] == "mixture")
        metrics = [
            {"type": metric, "name": title, "value": round(mixture[metric], 6)}
            for metric, title in (
                ("nll", "NLL per output token (nats)"),
                ("exact_match", "Exact match"),
            )
            if mixture[metric] is not None
        ]
        task = {"type": pipeline}
        dataset = {"name": facts["task"], "type": "custom"}
        found["model-index"] = [
            {
                "name": facts["name"],
                "results": [{"task": task, "dataset": dataset, "metrics": metrics}],
            }
        ]
    return found


def license_id(text: str) -> str:
    """A licence as the Hub writes it; ``other`` for what is no identifier."""
    lowered = text.strip().lower()
    return lowered if _LICENSE.match(lowered) else "other"


def cell(value: Any) -> str:
    """``value`` where Markdown and HTML mean nothing: fit for a table's cell."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def plusminus(spread: Mapping[str, float | None]) -> str:
    """``mean ± std``; a dash where there is no number."""
    return " ± ".join(
        "–" if spread[key] is None else f"{spread[key]:.4f}" for key in ("mean", "std")
    )


def code(value: Any) -> str:
    """``value`` as inline code that it cannot end."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    ticks = fence(text, least=1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fence(text: str, least: int = 3) -> str:
    """Backticks, more than stand in a row in ``text``."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def literal(value: Any) -> str:
    """``value`` as a string of Python's, in one line."""
    return json.dumps(str(value))
