"""The languages of recipes and factories as JSON schemas, for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from lorahub_registry.recipes.factory import Factory
from lorahub_registry.recipes.factory_file import SECTIONS
from lorahub_registry.recipes.model import Recipe

_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


class _Schema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title such as "Max Length" only repeats the key


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of what :func:`~lorahub_registry.recipes.parse` accepts.

    It cannot say what spans keys (which methods want coefficients or ``data.train``); parsing
    does.
    """
    schema = Recipe.model_json_schema(mode="validation", schema_generator=_Schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_standard(schema),
        "title": "lorareg recipe",
    }


def factory_schema() -> dict[str, Any]:
    """The schema of what :func:`~lorahub_registry.recipes.parse_factory` accepts.

    ``defaults`` may give what an adapter leaves out, so that nothing below ``data`` is required
    here; parsing requires it.
    """
    schema = _standard(Factory.model_json_schema(mode="validation", schema_generator=_Schema))
    parts = schema["$defs"]
    plan, data = parts["AdapterPlan"], parts["AdapterData"]
    plan["required"].remove("data")
    del data["required"]
    schema["properties"]["defaults"] = {
        "type": "object",
        "additionalProperties": False,
        "description": "Merged under every adapter's own, mapping by mapping.",
        "properties": {
            name: {
                "description": f"Of every adapter; what stands in its own {name} wins.",
                "$ref": "#/$defs/" + _ref(plan["properties"][name]).rsplit("/", 1)[-1],
            }
            for name in SECTIONS
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "lorareg factory",
    }


def _ref(schema: Mapping[str, Any]) -> str:
    """Of a field's own model, also where the field may be left out."""
    return str(next(s["$ref"] for s in (schema, *schema.get("anyOf", ())) if "$ref" in s))


def _standard(schema: Any) -> Any:
    """``schema`` with the bounds of checked numbers under the standard's names."""
    if isinstance(schema, list):
        return [_standard(s) for s in schema]
    if isinstance(schema, dict):
        bounded = schema.get("type") in ("integer", "number")
        return {_BOUNDS.get(k, k) if bounded else k: _standard(v) for k, v in schema.items()}
    return schema
