"""Experts made of adapters, as recipes write them."""

from __future__ import annotations

import pytest

from lorahub_registry.errors import RecipeError
from lorahub_registry.recipes import METHODS, json_schema, parse, to_yaml
from lorahub_registry.recipes.mixlora import MixLora, RouterTraining
from tests.recipes.test_routed import RECIPE, read, told


def test_the_defaults() -> None:
    found = read("{type: mixlora}")
    assert isinstance(found, MixLora)
    assert (found.top_k, found.attention, found.train_experts) == (2, "average", False)
    assert (found.router_aux_loss_coef, found.router_init_range) == (0.01, 0.02)
    training = found.training
    assert (training.learning_rate, training.batch_size, training.num_train_epochs) == (1e-3, 4, 5)
    assert (training.lr_scheduler_type, training.warmup_ratio) == ("cosine", 0.1)
    assert METHODS["mixlora"].dynamic
    assert found.learns


def test_what_is_given_is_read_and_written_again() -> None:
    text = RECIPE.replace(
        "METHOD",
        "{type: mixlora, top_k: 3, attention: two, train_experts: true, router_aux_loss_coef: 0, "
        "router_init_range: 0.5, training: {max_steps: 3}}",
    )
    assert parse(text).method == MixLora(
        top_k=3, attention="two", train_experts=True, router_aux_loss_coef=0.0,
        router_init_range=0.5, training=RouterTraining(max_steps=3),
    )  # fmt: skip
    assert parse(to_yaml(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("{type: mixlora, top_k: 1}", "method.top_k: must be at least 2"),
        ("{type: mixlora, top_k: 4}", "method.top_k: is 4, and the 3 adapters are 3 experts"),
        (
            "{type: mixlora, attention: tow}",
            "method.attention: must be average, learn or an adapter's name; got 'tow', did you "
            "mean 'two'?",
        ),
        ("{type: mixlora, router_aux_loss_coef: -1}", "router_aux_loss_coef: must be at least 0"),
        ("{type: mixlora, router_init_range: 0}", "router_init_range: must be more than 0"),
        ("{type: mixlora, train_experts: 1}", "method.train_experts: needs true or false, got 1"),
        ("{type: mixlora, training: {packing: true}}", "method.training.packing: unknown key"),
        ("{type: mixlora, experts: 3}", "method.experts: unknown key"),
        (
            "{type: mixlora, routing_strategy: mixlora}",
            "method.routing_strategy: unknown key; in a recipe the experts are the adapters, and "
            "routing is top_k",
        ),
        ("{type: mixlora, num_experts: 4}", "num_experts are a factory's"),
    ],
)
def test_what_cannot_be_is_told_with_its_line(method: str, said: str) -> None:
    [problem] = told(method)
    assert problem.startswith("line 8: method")
    assert said in problem


def test_it_needs_two_adapters_rows_and_no_coefficients() -> None:
    alone = RECIPE.replace("  - {ref: org/two, name: two}\n  - {ref: org/three, name: three}\n", "")
    [problem] = told("{type: mixlora}", alone)
    assert problem.startswith("line 4: adapters: mixlora chooses among two or more")
    [problem] = told("{type: mixlora}", RECIPE.replace("data: {train: {path: train.jsonl}}\n", ""))
    assert "data.train: is missing; method mixlora learns from its rows" in problem
    [problem] = told("{type: mixlora}", RECIPE.replace("name: two", "name: two, coefficient: 0.5"))
    assert "method mixlora decides the coefficients" in problem


def test_the_schema_knows_it() -> None:
    assert "MixLora" in json_schema()["$defs"]
    with pytest.raises(RecipeError):
        read("{type: mixlora, top_k: two}")


def test_a_recipe_whose_names_are_known_late_is_checked_late() -> None:
    with pytest.raises(RecipeError, match="adapters: mixlora chooses among two or more"):
        MixLora().check_names(["a"])
    with pytest.raises(RecipeError, match=r"method\.top_k: is 3, and the 2 adapters are 2 experts"):
        MixLora(top_k=3).check_names(["a", "b"])
    with pytest.raises(RecipeError, match=r"method\.attention: must be average, learn or an adapt"):
        MixLora(attention="c").check_names(["a", "b"])
