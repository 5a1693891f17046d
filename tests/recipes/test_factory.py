import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorahub_registry.errors import RecipeError
from lorahub_registry.recipes import (
    Factory,
    FactoryFile,
    LoraOptions,
    RecipeFile,
    TrainingOptions,
    TrainSplit,
    factory_digest,
    factory_from_mapping,
    factory_of_one,
    factory_schema,
    factory_yaml,
    load_any,
    load_factory,
    parse_factory,
)
from lorahub_registry.recipes.expert_training import ACTIVATIONS
from tests.recipes import GOOD

FACTORY = """\
version: 1
name: stories
base: ./stories260k
defaults:
  lora: {r: 8, lora_alpha: 16, target_modules: all-linear}
  training: {learning_rate: 2.0e-4, batch_size: 8, num_train_epochs: 3}
  data: {template: "{{ input }} ", max_length: 512, eos: true}
adapters:
  - name: zog
    skills: [names]
    description: Every name becomes Zog.
    lora: {r: 16, use_dora: true}
    training: {max_steps: 200, eval_steps: 10, early_stopping_patience: 3}
    data:
      train: {path: zog.jsonl, input: question, output: answer}
      validation: 0.1
      test: {path: test.jsonl, input: question, output: answer}
  - name: plain
    license: mit
    training: {seed: 5, packing: true}
    data: {train: {path: text.parquet, text: text}, validation: {path: held.jsonl, text: text}}
  - name: hub
    data: {train: {dataset: "me/rows@v1", config: main, split: "train[:10]"}}
evaluate: [nll, exact_match]
max_together: 8
output: {path: adapters}
license: apache-2.0
seed: 3
"""


def changed(old: str, new: str) -> str:
    assert FACTORY.count(old) == 1, old
    return FACTORY.replace(old, new)


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        parse_factory(text)
    return caught.value.problems


def test_a_factory_is_read_as_it_is_written() -> None:
    factory = parse_factory(FACTORY)
    zog, plain, hub = factory.adapters
    assert (factory.name, factory.base, factory.max_together) == ("stories", "./stories260k", 8)
    assert (zog.skills, zog.description) == (("names",), "Every name becomes Zog.")
    assert zog.data.validation == 0.1
    assert isinstance(plain.data.validation, TrainSplit)
    assert (zog.data.train.objective, plain.data.train.objective) == ("supervised", "lm")
    assert (hub.data.train.dataset, hub.data.train.split) == ("me/rows@v1", "train[:10]")
    assert [a.data.train.source for a in factory.adapters] == [
        "zog.jsonl", "text.parquet", "me/rows@v1"
    ]  # fmt: skip


def test_defaults_are_merged_under_each_adapter_mapping_by_mapping() -> None:
    zog, plain, hub = parse_factory(FACTORY).adapters
    assert (zog.lora.r, zog.lora.lora_alpha, zog.lora.use_dora) == (16, 16.0, True)
    assert (plain.lora.r, hub.lora) == (8, plain.lora)
    assert (zog.training.max_steps, zog.training.batch_size) == (200, 8)
    assert (hub.data.template, hub.data.max_length, hub.data.eos) == ("{{ input }} ", 512, True)


def test_a_split_s_columns_may_be_defaults_too() -> None:
    text = changed("eos: true}", "eos: true, train: {input: q, output: a}}")
    text = text.replace("text.parquet, text: text", "text.parquet")
    zog, plain, _ = parse_factory(text).adapters
    assert (zog.data.train.input, zog.data.train.output) == ("question", "answer")
    assert (plain.data.train.input, plain.data.train.output) == ("q", "a")


def test_licence_and_seed_of_the_factory_are_those_of_its_adapters() -> None:
    factory = parse_factory(FACTORY)
    assert [a.license for a in factory.adapters] == ["apache-2.0", "mit", "apache-2.0"]
    assert [a.training.seed for a in factory.adapters] == [3, 5, 3]


def test_what_is_left_out_has_the_documented_default() -> None:
    factory = factory_from_mapping(
        {"version": 1, "name": "f", "base": "b", "output": {"path": "out"},
         "adapters": [{"name": "a", "data": {"train": {"path": "a.csv"}}}]}
    )  # fmt: skip
    (plan,) = factory.adapters
    assert plan.lora == LoraOptions()
    assert plan.training == TrainingOptions(seed=0)
    assert (plan.lora.r, plan.lora.lora_alpha, plan.lora.target_modules) == (8, 16.0, "all-linear")
    assert plan.lora.init_lora_weights is True
    assert (plan.training.learning_rate, plan.training.max_grad_norm) == (2e-4, 1.0)
    assert (plan.data.template, plan.data.max_length, plan.data.eos) == (
        "{{ input }} ",
        None,
        False,
    )
    assert (factory.evaluate, factory.max_together, factory.save_steps) == (("nll",), None, 100)
    assert (factory.quantization, factory.dtype, factory.output.dtype) == (None, "auto", "float32")


def test_the_scaling_is_peft_s() -> None:
    assert LoraOptions(r=16, lora_alpha=8).scaling == 0.5
    assert LoraOptions(r=16, lora_alpha=8, use_rslora=True).scaling == 8 / math.sqrt(16)


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "pissa_niter_4", "olora"])
def test_the_starts_are_peft_s(init: Any) -> None:
    assert LoraOptions(init_lora_weights=init).init_lora_weights is init
    assert LoraOptions(init_lora_weights=init).changes_base == (init not in (True, "gaussian"))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "r: 16,",
            "rank: 16,",
            "line 12: adapters[0].lora.rank: unknown key, did you mean 'r'?",
        ),
        (
            "r: 16,",
            "save_steps: 16,",
            "line 12: adapters[0].lora.save_steps: unknown key; it stands at the top",
        ),
        (
            "r: 16,",
            "batch_size: 16,",
            "line 12: adapters[0].lora.batch_size: unknown key; it stands under training",
        ),
        (
            "max_steps: 200",
            "max_step: 1",
            "line 13: adapters[0].training.max_step: unknown key, did you mean 'max_steps'?",
        ),
        ("lora_alpha: 16", "alpha: 16", "line 5: defaults.lora.alpha: unknown key, did you mean"),
        (
            "batch_size: 8",
            "batch_size: 0",
            "line 6: defaults.training.batch_size: must be at least",
        ),
        ("eos: true}", "eos: 1}", "line 7: defaults.data.eos: needs true or false, got 1"),
        (
            "  data: {template",
            "  date: {template",
            "line 7: defaults.date: unknown key, did you mean",
        ),
        (
            "  lora: {r: 8, lora_alpha: 16, target_modules: all-linear}",
            "  lora: 8",
            "line 5: defaults.lora: needs a mapping of keys, got 8",
        ),
        ("name: plain", "name: zog", "line 18: adapters[1].name: 'zog' is the name of adapters[0]"),
        (
            "name: plain",
            "name: ZOG",
            "'ZOG' is the name of adapters[0] already; each adapter gets a",
        ),
        ("name: plain", "name: a/b", "line 18: adapters[1].name: 'a/b' cannot be a name"),
        ("name: plain", "name: base", "what the proof calls a row of its own"),
        ("validation: 0.1", "validation: 1", "line 16: adapters[0].data.validation: must be less"),
        ("validation: 0.1", "validation: 0", "data.validation: must be more than 0, got 0"),
        (
            "validation: 0.1",
            "validation: {file: a.csv}",
            "line 16: adapters[0].data.validation.file: unknown key",
        ),
        (
            "path: held.jsonl",
            "pth: held.jsonl",
            "line 21: adapters[1].data.validation.pth: unknown key, did you mean 'path'?",
        ),
        (
            "    data: {train: {dataset:",
            "    date: {train: {dataset:",
            "line 22: adapters[2].data.train: is missing",
        ),
        ("path: zog.jsonl, ", "", "line 15: adapters[0].data.train: needs path: FILE or dataset: "),
        ("path: zog.jsonl,", "path: zog.jsonl, dataset: a/b,", "takes path or dataset, not both"),
        ("text.parquet, text", "text.parquet, input: q, text", "takes text, or input and output"),
        ("path: zog.jsonl,", "path: zog.jsonl, split: test,", "config and split are a dataset's"),
        ("me/rows@v1", "me/rows/x", "dataset: must be owner/name, owner/name@revision or ./folder"),
        ("zog.jsonl", "zog.txt", "line 15: adapters[0].data.train.path: must end in one of .jsonl"),
        (
            "use_dora: true",
            "use_dora: true, init_lora_weights: pissa",
            "line 12: adapters[0].lora: use_dora and init_lora_weights: pissa do not go together",
        ),
        ("use_dora: true", "init_lora_weights: pisa", "got 'pisa', did you mean 'pissa'?"),
        ("use_dora: true", "init_lora_weights: false", "must be true, gaussian, pissa"),
        ("use_dora: true", "target_modules: []", "needs at least one module name, or all-linear"),
        ("use_dora: true", "target_modules: [q, q]", "lora.target_modules: names a module twice"),
        ("use_dora: true", "loraplus_lr_ratio: 0", "lora.loraplus_lr_ratio: must be more than 0"),
        ("use_dora: true", "lora_dropout: 1", "lora.lora_dropout: must be less than 1, got 1"),
        (
            "validation: 0.1\n",
            "\n",
            "line 13: adapters[0].training.eval_steps: needs data.validation",
        ),
        (
            "eval_steps: 10, ",
            "",
            "line 13: adapters[0].training.early_stopping_patience: counts eval",
        ),
        (
            "patience: 3",
            "threshold: 0.1",
            "early_stopping_threshold: is for early_stopping_patience",
        ),
        ("max_length: 512, ", "", "line 20: adapters[1].training.packing: needs data.max_length"),
        ("packing: true", "packing: true, group_by_length: true", "and packing do not go together"),
        (
            '"{{ input }} "',
            '"{{ answer }} "',
            "line 7: defaults.data.template: shows the answer "
            "('answer' of train) in the prompt (for adapters[0])",
        ),
        (
            "license: mit",
            "license: MIT License",
            "line 19: adapters[1].license: 'MIT License' is not",
        ),
        (
            "lora: {r: 16, use_dora: true}",
            "method: {type: mixlora, act_fn: swiglu}",
            "line 12: adapters[0].method.act_fn: transformers knows no 'swiglu', did you mean "
            "'silu'?: one of gelu, ",
        ),
        (
            "lora: {r: 16, use_dora: true}",
            "method: {type: mixlora}\n    lora: {init_lora_weights: pissa_niter_4}",
            "line 13: adapters[0].lora.init_lora_weights: pissa_niter_4 takes a part out of the "
            "base, which experts share: use true or gaussian",
        ),
        (
            "    training: {seed: 5, packing: true}",
            "    method: {type: mixlora, routing_strategy: mixlora-switch}\n"
            "    training: {seed: 5, packing: true}",
            "line 21: adapters[1].training.packing: does not go with mixlora-switch, which counts "
            "the tokens of each row: use group_by_length",
        ),
        ("[nll, exact_match]", "[nll, nll]", "evaluate: names a metric twice"),
        ("max_together: 8", "quantization: 2bit", "quantization: must be one of 8bit, 4bit"),
        ("seed: 3", "seed: 3\nseed: 4", "line 29: seed: given twice (first on line 28)"),
        ("seed: 3", "seeds: 3", "line 28: seeds: unknown key, did you mean 'seed'?"),
    ],
)
def test_a_fault_is_told_in_plain_words_with_its_line(old: str, new: str, told: str) -> None:
    found = problems(changed(old, new))
    assert any(told in p for p in found), found


def test_what_does_not_go_with_experts_is_told_of_plain_data_too() -> None:
    plain = yaml.safe_load(FACTORY)
    plain["adapters"][1]["method"] = {"type": "mixlora"}
    factory_from_mapping(plain)
    plain["adapters"][1]["lora"] = {"init_lora_weights": "olora"}
    with pytest.raises(RecipeError) as caught:
        factory_from_mapping(plain)
    [problem] = caught.value.problems
    assert problem.startswith("adapters[1].lora.init_lora_weights: olora takes a part out")


def test_activations_are_transformers_own() -> None:
    from transformers.activations import ACT2FN

    assert sorted(ACTIVATIONS) == sorted(ACT2FN)


def test_a_fault_in_the_defaults_is_told_once_and_there() -> None:
    assert problems(changed("lora_alpha: 16", "lora_alhpa: 16")) == (
        "line 5: defaults.lora.lora_alhpa: unknown key, did you mean 'lora_alpha'?",
    )


def test_every_error_is_told_at_once() -> None:
    text = (
        changed("name: plain", "name: Zog").replace("r: 16", "r: 0").replace("seed: 3", "sede: 3")
    )
    text = text.replace("batch_size: 8", "batch_size: x")
    lines = [int(re.match(r"line (\d+)", p)[1]) for p in problems(text)]  # type: ignore[index]
    assert lines == [6, 12, 18, 28]


def test_plain_data_has_no_lines_to_tell() -> None:
    data = yaml.safe_load(FACTORY)
    assert factory_from_mapping(data) == parse_factory(FACTORY)
    data["defaults"]["lora"]["r"] = 0
    with pytest.raises(RecipeError) as caught:
        factory_from_mapping(data)
    assert caught.value.problems == ("defaults.lora.r: must be at least 1, got 0 (for adapters[1], "
                                     "adapters[2])",)  # fmt: skip


@pytest.mark.parametrize("text", ["", "[1]", "5"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    (told,) = problems(text)
    assert "a factory is a mapping of keys" in told


def test_what_is_written_reads_back_as_the_same_factory() -> None:
    text = FACTORY.replace("max_steps: 200", "max_steps: 200, max_grad_norm: null")
    factory = parse_factory(text)
    assert factory.adapters[0].training.max_grad_norm is None
    written = factory_yaml(factory)
    again = parse_factory(written)
    assert again == factory
    assert factory_yaml(again) == written
    assert (
        factory_digest(again) == factory_digest(factory) != factory_digest(parse_factory(FACTORY))
    )


def test_the_entry_of_one_adapter_tells_nothing_of_the_machine() -> None:
    text = FACTORY.replace("zog.jsonl", "/home/jo/rows/zog.jsonl").replace(
        "test.jsonl", "C:\\\\Users\\\\jo\\\\test.jsonl"
    )
    text = text.replace("me/rows@v1", "/home/jo/sets/rows").replace(
        "path: adapters", "path: ~/jo/a"
    )
    factory = parse_factory(text)
    one = factory_of_one(factory, "zog", base="/home/jo/stories260k")
    assert [a.name for a in one.adapters] == ["zog"]
    assert one.base == "./stories260k"
    assert one.adapters[0].data.train.path == "zog.jsonl"
    assert one.adapters[0].data.test is not None
    assert one.adapters[0].data.test.path == "test.jsonl"
    assert one.adapters[0].lora == factory.adapters[0].lora
    assert "jo/" not in factory_yaml(one)
    hub = factory_of_one(factory, "hub", base="me/base@1")
    assert (hub.adapters[0].data.train.dataset, hub.base) == ("./rows", "me/base@1")


def test_files_are_told_apart_by_their_method(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(FACTORY, "utf-8")
    (tmp_path / "r.yaml").write_text(GOOD, "utf-8")
    file = load_any(tmp_path / "f.yaml")
    assert isinstance(file, FactoryFile)
    assert file == load_factory(tmp_path / "f.yaml")
    assert file.resolve("zog.jsonl") == tmp_path / "zog.jsonl"
    assert isinstance(load_any(tmp_path / "r.yaml"), RecipeFile)
    with pytest.raises(RecipeError, match="no such factory"):
        load_factory(tmp_path / "absent.yaml")


def _refs(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_refs, schema)) if schema else set()
    if isinstance(schema, dict):
        own = {schema["$ref"]} if "$ref" in schema else set()
        return own.union(*map(_refs, schema.values()))
    return set()


def test_the_schema_has_every_key_with_its_bounds_and_the_defaults() -> None:
    schema = factory_schema()
    defs = schema["$defs"]
    assert set(schema["properties"]) == {*Factory.model_fields, "defaults"}
    sections = {"lora", "method", "training", "data"}
    assert set(schema["properties"]["defaults"]["properties"]) == sections
    assert defs["AdapterPlan"]["required"] == ["name"]
    assert "required" not in defs["AdapterData"]
    assert defs["LoraOptions"]["properties"]["lora_dropout"]["exclusiveMaximum"] == 1
    assert _refs(schema) <= {f"#/$defs/{name}" for name in defs}
    for part in defs.values():
        assert part["additionalProperties"] is False
        assert all("description" in value for value in part["properties"].values())
