"""The recipe language as a JSON schema, for editors."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

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


def _standard(schema: Any) -> Any:
    """``schema`` with the bounds of checked numbers under the standard's names."""
    if isinstance(schema, list):
        return [_standard(s) for s in schema]
    if isinstance(schema, dict):
        bounded = schema.get("type") in ("integer", "number")
        return {_BOUNDS.get(k, k) if bounded else k: _standard(v) for k, v in schema.items()}
    return schema
