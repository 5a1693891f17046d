"""Methods that decide while they run, as recipes write them."""

from __future__ import annotations

import pytest

from lorahub_registry.errors import RecipeError
from lorahub_registry.recipes import METHODS, from_mapping, json_schema, parse, to_yaml
from lorahub_registry.recipes.routed import Arrow, GateTraining, LoraFlow, PromptRouter

RECIPE = """\
version: 1
name: mix
base: org/base
adapters:
  - {ref: org/one, name: one}
  - {ref: org/two, name: two}
  - {ref: org/three, name: three}
method: METHOD
data: {train: {path: train.jsonl}}
output: {path: out}
"""


def read(method: str, text: str = RECIPE) -> object:
    return parse(text.replace("METHOD", method)).method


def told(method: str, text: str = RECIPE) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read(method, text)
    return caught.value.problems


def test_the_defaults_are_the_papers() -> None:
    flow = read("{type: lora_flow}")
    assert isinstance(flow, LoraFlow)
    assert (flow.per, flow.temperature, flow.init) == ("layer", 1.0, "learn")
    training = flow.training
    assert (training.learning_rate, training.num_train_epochs, training.batch_size) == (1e-3, 5, 4)
    assert (training.lr_scheduler_type, training.warmup_ratio) == ("cosine", 0.2)
    assert (training.weight_decay, training.adam_beta2) == (0.1, 0.95)
    arrow = read("{type: arrow}")
    assert isinstance(arrow, Arrow)
    assert (arrow.top_k, arrow.temperature, arrow.general) == (3, 1.0, ())


def test_what_is_given_is_read_and_written_again() -> None:
    flow = read(
        "{type: lora_flow, per: module, temperature: 2, init: two, training: {max_steps: 3}}"
    )
    assert flow == LoraFlow(
        per="module", temperature=2.0, init="two", training=GateTraining(max_steps=3)
    )
    text = RECIPE.replace("METHOD", "{type: arrow, top_k: 2, temperature: 0.5, general: [three]}")
    assert parse(to_yaml(parse(text))) == parse(text)
    assert parse(text).method == Arrow(top_k=2, temperature=0.5, general=("three",))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("{type: lora_flow, per: head}", "method.per: must be one of layer, module, model"),
        ("{type: lora_flow, temperature: 0}", "method.temperature: must be more than 0"),
        (
            "{type: lora_flow, init: tow}",
            "method.init: must be learn, uniform or an adapter's name",
        ),
        ("{type: lora_flow, training: {lr: 1}}", "did you mean 'learning_rate'?"),
        ("{type: lora_flow, training: {packing: true}}", "method.training.packing: unknown key"),
        ("{type: lora_flow, training: {adam_beta2: 1}}", "adam_beta2: must be less than 1"),
        ("{type: lora_flow, training: {adam_beta2: 0}}", "adam_beta2: must be more than 0"),
        ("{type: lora_flow, top_k: 2}", "method.top_k: unknown key"),
        ("{type: arrow, top_k: 0}", "method.top_k: must be at least 1"),
        ("{type: arrow, training: {}}", "method.training: unknown key"),
        ("{type: arrow, general: [for]}", "method.general[0]: no adapter is called 'for'"),
        ("{type: arrow, general: [one, one]}", "general names an adapter twice"),
        ("{type: arrow, general: [one, two]}", "method.general: leaves 1 to choose among"),
        ("{type: prompt_router, examples: {four: f.jsonl}}", "no adapter is called 'four'"),
    ],
)
def test_what_cannot_be_is_told_with_its_line(method: str, said: str) -> None:
    [problem] = told(method)
    assert problem.startswith("line 8: method")
    assert said in problem


@pytest.mark.parametrize("method", ["lora_flow", "arrow", "prompt_router"])
def test_coefficients_are_not_given(method: str) -> None:
    text = RECIPE.replace("name: two", "name: two, coefficient: 0.5")
    [problem] = told(f"{{type: {method}}}", text)
    assert problem.startswith("line 6: adapters[1].coefficient: ")
    assert f"method {method} decides the coefficients" in problem


def test_one_adapter_is_no_choice() -> None:
    alone = RECIPE.replace("  - {ref: org/two, name: two}\n  - {ref: org/three, name: three}\n", "")
    [problem] = told("{type: lora_flow}", alone)
    assert problem.startswith("line 4: adapters: lora_flow chooses among two or more")
    [problem] = told("{type: lora_flow, init: org-one}", alone.replace(", name: one", ""))
    assert "two or more" in problem
    [problem] = told("{type: lora_flow}", alone.replace("\n  - {ref: org/one, name: one}", " []"))
    assert "two or more" not in problem, "that there are none is enough"
    searched = alone.replace("{ref: org/one, name: one}", "{search: {skill: code}, limit: 3}")
    assert isinstance(read("{type: lora_flow}", searched), LoraFlow), "who knows how many it finds"


def test_a_wrong_name_in_a_method_has_its_own_line() -> None:
    text = RECIPE.replace("method: METHOD", "method:\n  type: KIND\n  SAID")
    for kind, said, line, problem in (
        ("lora_flow", "per: layer\n  init: tow", 11, "method.init: must be learn, uniform or an"),
        (
            "arrow",
            "general:\n    - one\n    - for",
            12,
            "method.general[1]: no adapter is called 'f",
        ),
        (
            "prompt_router",
            "examples:\n    one: a.jsonl\n    tow: b.jsonl",
            12,
            "method.examples.tow: no adapter is called 'tow', did you mean 'two'?",
        ),
    ):
        with pytest.raises(RecipeError) as caught:
            parse(text.replace("KIND", kind).replace("SAID", said))
        [said_now] = caught.value.problems
        assert said_now.startswith(f"line {line}: {problem}")


def test_names_that_only_resolving_gives_are_checked_then() -> None:
    unnamed = RECIPE.replace(", name: one", "")
    method = read("{type: lora_flow, init: org-one}", unnamed)
    assert isinstance(method, LoraFlow)
    method.check_names(["org-one", "two"])
    with pytest.raises(RecipeError, match=r"method\.init.*'org-one'") as caught:
        method.check_names(["one", "two"])
    assert caught.value.hint == "the adapters are one, two"
    with pytest.raises(RecipeError, match="leaves 0"):
        Arrow(general=("a", "b")).check_names(["a", "b"])
    with pytest.raises(RecipeError, match="adapters: arrow chooses among two or more"):
        Arrow().check_names(["a"])
    with pytest.raises(RecipeError, match=r"method\.examples\.c: no adapter is called 'c'"):
        PromptRouter(examples={"c": "c.jsonl"}).check_names(["a", "b"])


def test_gates_need_rows_and_arrow_none() -> None:
    without = RECIPE.replace("data: {train: {path: train.jsonl}}\n", "")
    [problem] = told("{type: lora_flow}", without)
    assert "data.train: is missing" in problem
    assert isinstance(read("{type: arrow}", without), Arrow)


def test_editors_and_help_know_them() -> None:
    shapes = json_schema()["$defs"]
    assert {"lora_flow", "arrow", "prompt_router"} <= METHODS.keys()
    assert set(shapes["LoraFlow"]["properties"]) == {
        "type", "per", "temperature", "init", "training",
    }  # fmt: skip
    assert shapes["GateTraining"]["properties"]["adam_beta2"]["default"] == 0.95
    assert shapes["GateTraining"]["additionalProperties"] is False
    for name in ("lora_flow", "arrow"):
        assert METHODS[name].dynamic
        assert not METHODS["learn"].dynamic


def test_a_method_of_python_s_own_is_checked_like_a_file_s() -> None:
    data = {
        "version": 1, "name": "mix", "base": "org/base", "adapters": ["org/one", "org/two"],
        "method": {"type": "arrow", "top_k": "many"}, "output": {"path": "out"},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"method\.top_k"):
        from_mapping(data)
