import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from lorahub_registry.errors import RecipeError
from lorahub_registry.recipes import (
    METHODS,
    Recipe,
    RefEntry,
    digest,
    json_schema,
    parse,
    pinned,
    to_yaml,
)
from tests.recipes import GOOD, LINEAR
from tests.recipes.strategies import recipes


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes())
def test_what_is_written_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    text = to_yaml(recipe)
    again = parse(text)
    assert again == recipe
    assert digest(again) == digest(recipe)
    assert to_yaml(again) == text


def test_every_default_is_written_out_in_a_fixed_order() -> None:
    written = yaml.safe_load(to_yaml(parse(LINEAR)))
    assert list(written) == [
        "version", "name", "base", "adapters", "method", "data", "evaluate", "max_new_tokens",
        "output", "seed", "device", "dtype", "allow_base",
    ]  # fmt: skip
    assert written["output"] == {"path": "out", "rank": "full", "dtype": "float32"}
    assert next(iter(yaml.safe_load(to_yaml(parse(GOOD)))["method"])) == "type"
    pruned = LINEAR.replace("type: linear", "type: ties").replace("path: out", "path: out, rank: 8")
    method = yaml.safe_load(to_yaml(parse(pruned)))["method"]
    assert list(method.items()) == [
        ("type", "ties"), ("density", 0.5), ("majority_sign_method", "total")
    ]  # fmt: skip


def test_other_yaml_readers_see_the_same_data() -> None:
    text = LINEAR.replace("half-and-half", "'1e3'").replace("base: mistral-7b", "base: 'off'")
    written = yaml.safe_load(to_yaml(parse(text)))
    assert (written["name"], written["base"]) == ("1e3", "off")


def test_the_digest_is_of_the_meaning_not_of_the_writing() -> None:
    spread = LINEAR.replace("{ref: ./one, coefficient: 0.5}", "coefficient: 5e-1\n    ref: './one'")
    assert digest(parse(spread)) == digest(parse(LINEAR + "seed: 0  # the default\n"))
    assert digest(parse(LINEAR + "seed: 1\n")) != digest(parse(LINEAR))
    assert len(digest(parse(LINEAR))) == 64


def test_nothing_changes_in_a_recipe_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(GOOD).seed = 3  # type: ignore[misc]


def test_a_pinned_recipe_is_resolved_and_tells_nothing_of_the_machine() -> None:
    text = GOOD.replace("examples.jsonl", "/home/jo/data/examples.jsonl")
    text = text.replace("heldout.jsonl", "C:\\\\Users\\\\jo\\\\heldout.jsonl")
    text = text.replace("out/code-and-chat", "~/out/mix")
    commit = "0123456789" * 4
    recipe = pinned(
        parse(text),
        base="/srv/jo/models/mistral",
        adapters=[
            RefEntry(ref=f"someone/many-loras/chat/v3@{commit}", name="chat"),
            RefEntry(ref="/home/jo/loras/sql", name="sql"),
            RefEntry(ref="/home/jo/old/sql", name="old"),
            RefEntry(ref="../beside", name="beside"),
        ],
    )
    text = to_yaml(recipe)
    assert "jo" not in text.replace("json", "")
    refs = [a.ref for a in recipe.adapters if isinstance(a, RefEntry)]
    assert refs == [f"someone/many-loras/chat/v3@{commit}", "./sql", "./sql-2", "../beside"]
    assert recipe.base == "./mistral"
    assert recipe.data.train is not None
    assert recipe.data.test is not None
    assert (recipe.data.train.path, recipe.data.test.path) == ("examples.jsonl", "heldout.jsonl")
    assert recipe.output.path == "mix"
    assert parse(text) == recipe


def test_pinning_one_adapter_twice_is_refused() -> None:
    twice = [RefEntry(ref="a/b@main", name="x"), RefEntry(ref="a/b@main", name="y")]
    with pytest.raises(RecipeError, match="is the same adapter as"):
        pinned(parse(GOOD), base="b", adapters=twice)


def _objects(schema: object, path: str = "") -> list[tuple[str, dict[str, object]]]:
    found = []
    if isinstance(schema, dict):
        if "properties" in schema:
            found.append((path, schema))
        for key, value in schema.items():
            found += _objects(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for i, value in enumerate(schema):
            found += _objects(value, f"{path}/{i}")
    return found


def test_the_schema_is_strict_and_describes_each_key() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "lorareg recipe"
    assert "$id" not in schema
    objects = _objects(schema)
    assert len(objects) > len(METHODS) + 6
    for path, part in objects:
        assert part["additionalProperties"] is False, path
        if path.endswith("/output/properties/rank/anyOf/3") or "/rank/anyOf/" in path:
            continue
        properties = part["properties"]
        assert isinstance(properties, dict)
        for key, value in properties.items():
            assert "description" in value or "anyOf" in value, f"{path}/{key}"


def test_the_schema_knows_the_bounds_and_the_choices() -> None:
    defs = json_schema()["$defs"]
    assert defs["Learn"]["properties"]["budget"]["maximum"] == 100_000
    assert defs["Learn"]["properties"]["bounds"]["exclusiveMinimum"] == 0
    assert "NGOpt" in defs["Learn"]["properties"]["optimizer"]["examples"]
    assert defs["Learn"]["properties"]["gradient"]["enum"] == ["lbfgs", "adam"]
    assert defs["Output"]["properties"]["rank"]["default"] == "full"
    for cls in METHODS.values():
        assert defs[cls.__name__]["required"] == ["type"]
    assert [o.get("type") for o in defs["RefEntry"]["anyOf"]] == ["string", "object"]


def test_each_method_says_what_it_is_and_where_it_comes_from() -> None:
    assert list(METHODS) == [
        "linear", "factor", "ties", "dare_linear", "dare_ties", "magnitude_prune", "learn",
        "lorahub", "lora_flow", "arrow", "prompt_router", "mixlora",
    ]  # fmt: skip
    for name, cls in METHODS.items():
        assert cls.name() == name
        assert cls.info.title
        assert cls.info.summary.endswith(".")
        assert cls.info.paper
        assert cls.info.link.startswith("https://")
        assert cls.coefficients in {"given", "learned", "routed"}


def test_the_optimizers_are_nevergrad_s() -> None:
    ng = pytest.importorskip("nevergrad")
    shown = {
        method: json_schema()["$defs"][method]["properties"]["optimizer"]["examples"]
        for method in ("Learn", "LoraHub")
    }
    assert shown["Learn"] == ["gradient", *shown["LoraHub"]]
    assert set(shown["LoraHub"]) <= set(ng.optimizers.registry)


def test_recipes_are_read_without_torch_or_the_hub() -> None:
    code = (
        "import sys, lorahub_registry.recipes\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'nevergrad', 'click'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
