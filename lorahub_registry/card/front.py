"""A card's front matter: metadata in the Hub's own words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LICENSE = re.compile(r"[a-z0-9][a-z0-9._-]*\Z")


def is_trained(facts: Mapping[str, Any]) -> bool:
    """Whether these are the results of training; else they are a mixture's."""
    return facts.get("kind") == "trained"


def is_converted(facts: Mapping[str, Any]) -> bool:
    """Whether these are of published files that ``convert`` took: no recipe made them."""
    return facts.get("kind") == "converted"


def holds_experts(facts: Mapping[str, Any]) -> bool:
    """Whether what was converted is a MixLoRA, LoRAMoE or MoLA; else it is gates' mixture."""
    return is_converted(facts) and "experts" in facts


def metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The front matter.

    Languages are said where a converted adapter's own card has said them; nothing here knows them.
    The base of such an adapter may be unknown (None), and is then left out.
    """
    base = facts["base"]["name"]
    trained, experts = is_trained(facts), holds_experts(facts)
    pipeline = "text2text-generation" if facts["seq2seq"] else "text-generation"
    kinds = [facts["method"]["type"]] if experts else ["mixlora"] if facts.get("experts") else []
    tags = [
        "lora",
        *kinds,
        "lorareg",
        *([] if trained or experts else ["merge"]),
        *([f"base_model:adapter:{base}"] if base else []),
    ]
    if trained or experts:
        tags += [skill for skill in facts["skills"] if skill not in tags]
    found: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "library_name": "peft",
        "pipeline_tag": pipeline,
        "tags": tags,
    }
    if facts["license"]:
        found["license"] = license_id(facts["license"])
    if facts.get("languages"):
        found["language"] = list(facts["languages"])
    if facts["datasets"]:
        found["datasets"] = list(facts["datasets"])
    if facts.get("test"):
        # The root of a mixture that decides is its plain LoRA: these are the root's own scores.
        kind = "adapter" if trained else "plain" if "routing" in facts else "mixture"
        own = next(row for row in facts["test"] if row["kind"] == kind)
        metrics = [
            {"type": metric, "name": title, "value": round(own[metric], 6)}
            for metric, title in (
                ("nll", "NLL per output token (nats)"),
                ("exact_match", "Exact match"),
            )
            if own[metric] is not None
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
