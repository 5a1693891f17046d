"""MixLoRA, LoRAMoE and MoLA: what a config says, and whether the tensors are those it speaks of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorahub_registry.adapters.base_files import BaseFacts
from lorahub_registry.adapters.compat import Member, check_base, check_sum
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.adapters.mixlora import (
    LoraPart,
    MixLora,
    Switch,
    TopK,
    TopP,
    check_shapes,
    modern_names,
    parse_mixlora,
    settled,
    to_config,
)
from lorahub_registry.adapters.mixlora_keys import widths
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters
from tests.mixlora import ATTENTION, MLP, STRATEGIES, Strategy, legacy, make, save

Shapes = dict[str, tuple[int, ...]]
FIRST = "mixlora.layers.0.mlp"


def read(strategy: Strategy = "mixlora", **options: Any) -> tuple[MixLora, Shapes]:
    config, tensors = make(strategy, **options)
    return parse_mixlora(config, "here"), {k: tuple(v.shape) for k, v in tensors.items()}


def parsed(**changes: Any) -> MixLora:
    return parse_mixlora(make(**changes)[0], "here")


# What the config says


def test_a_config_of_m_lora_is_read() -> None:
    raw = {
        "bias": "none", "peft_type": "MIXLORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        "expert_lora": {"bias": "none", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
        "routing_strategy": "mixlora", "num_experts": 8, "act_fn": "silu", "top_k": 2,
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    part = LoraPart(8, 16.0, 0.05)
    assert parse_mixlora(raw, "here") == MixLora(
        kind="MIXLORA",
        num_experts=8,
        routing=TopK(2),
        attention=part,
        experts=part,
        target_modules=("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "v_proj"),
        act_fn="silu",
        base="meta-llama/Llama-2-7b-hf",
    )


def bare(strategy: str, peft_type: str = "MIXLORA", **more: Any) -> MixLora:
    """A config that says no more than it must."""
    said = {"r": 4, "lora_alpha": 8, "num_experts": 4, "target_modules": ["up_proj"]}
    return parse_mixlora(
        {"peft_type": peft_type, "routing_strategy": strategy, **said, **more}, "here"
    )


@pytest.mark.parametrize(
    ("made", "routing", "loss", "init", "jitter"),
    [
        (bare("mixlora"), TopK(2), True, 0.02, 0.0),
        (bare("mixlora-dynamic"), TopP(0.8), True, 0.02, 0.0),
        (bare("mixlora-switch"), Switch(32), True, 1.0, 0.01),
        (bare("loramoe", "LORAMOE"), None, False, 5.0, 0.0),
        (bare("mola", "MOLA"), TopK(2), False, 5.0, 0.0),
    ],
)
def test_each_strategy_has_its_readers_defaults(
    made: MixLora, routing: Any, loss: bool, init: float, jitter: float
) -> None:
    assert made.routing == routing
    assert (made.router_loss, made.router_init_range, made.jitter_noise) == (loss, init, jitter)
    assert (made.router_aux_loss_coef, made.router_z_loss_coef) == (0.001, 0.001)
    assert made.attention == made.experts == LoraPart(4, 8.0)


@pytest.mark.parametrize(("old", "new"), [("mixtral", "mixlora"), ("switch", "mixlora-switch")])
def test_older_names_of_strategies_are_todays(old: str, new: str) -> None:
    assert bare(old) == bare(new)
    assert to_config(bare(old))["routing_strategy"] == new


def test_the_strategy_tells_the_kind_where_peft_type_is_missing() -> None:
    raw = {**make("mola")[0]}
    del raw["peft_type"]
    assert parse_mixlora(raw, "here").kind == "MOLA"


def test_null_is_absent_and_unknown_keys_are_left_alone() -> None:
    nothing = {"router_loss": None, "top_k": None, "act_fn": None, "expert_lora": None}
    raw = make()[0] | nothing | {"peft_version": "0.21", "auto_mapping": None, "more": {"x": [1]}}
    assert parse_mixlora(raw, "here") == parsed(top_k=None, act_fn=None)


def test_targets_are_a_list_or_an_object() -> None:
    some = {"q_proj": True, "w1_proj": True, "down_proj": True, "fc1": False, "fc2": None}
    assert parsed(target_modules=some).target_modules == ("down_proj", "gate_proj", "q_proj")


def test_experts_inherit_what_expert_lora_leaves_out() -> None:
    config = make()[0] | {"use_rslora": True, "expert_lora": {"r": 2, "use_dora": True}}
    mix = parse_mixlora(config, "here")
    assert mix.attention == LoraPart(4, 8.0, 0.05, use_rslora=True)
    assert mix.experts == LoraPart(2, 8.0, 0.05, use_dora=True, use_rslora=True)
    assert mix.attention.scaling == 8 / 2
    assert mix.experts.scaling == 8 / math.sqrt(2)


def test_without_rslora_the_scaling_is_alpha_over_r() -> None:
    assert LoraPart(4, 6.0).scaling == 1.5


@pytest.mark.parametrize("kind", ["LORAMOE", "MOLA"])
def test_only_mixlora_has_settings_of_its_own_for_experts(kind: str) -> None:
    mix = bare(kind.lower(), kind, expert_lora={"r": 1}, act_fn="silu")
    assert mix.experts.r == 4
    assert mix.act_fn is None


def test_all_that_cannot_be_is_told_at_once() -> None:
    raw = {
        "peft_type": "MIXLORA", "routing_strategy": "mixlora", "r": 0, "lora_alpha": -1,
        "target_modules": [], "num_experts": 2, "top_k": 3, "router_loss": "yes", "bias": "all",
        "expert_lora": {"lora_dropout": 2}, "jitter_noise": -0.5, "act_fn": 3,
    }  # fmt: skip
    with pytest.raises(BrokenAdapter) as caught:
        parse_mixlora(raw, "there/adapter_config.json")
    said = str(caught.value).splitlines()
    assert said[0].startswith("there/adapter_config.json")
    keys = ["bias", "r", "lora_alpha", "expert_lora's lora_dropout", "top_k", "target_modules",
            "act_fn", "router_loss", "jitter_noise"]  # fmt: skip
    for key in keys:
        assert sum(line.strip().startswith(f"{key} ") for line in said) == 1, key
    assert len(said) == 1 + len(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "top_k is 5, and num_experts is 4"),
        ({"num_experts": 1, "top_k": None}, "top_k is 2, and num_experts is 1"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_experts": True}, "num_experts is True, not a whole number"),
        ({"num_experts": 1 << 20}, "num_experts is 1048576, not a whole number from 1 to 4096"),
        ({"r": 2.5}, "r is 2.5, not a whole number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, not a number above 0"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"routing_strategy": None}, "routing_strategy is missing"),
        ({"routing_strategy": "mola"}, "routing_strategy is 'mola'; of MIXLORA it is one of"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', none of MIXLORA"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}"),
        ({"target_modules": {"q_proj": False}}, "target_modules names no module that is on"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": [f"m{i}" for i in range(99)]}, "target_modules names 99 modules"),
        ({"expert_lora": [1]}, r"expert_lora is \[1\], not an object"),
        ({"expert_lora": {"r": -1}}, "expert_lora's r is -1"),
        ({"use_dora": 1}, "use_dora is 1, neither true nor false"),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0}, "top_p is 0, not a number above 0"),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 1.5}, "top_p is 1.5"),
        ({"routing_strategy": "switch", "expert_capacity": 0}, "expert_capacity is 0"),
        ({"routing_strategy": "switch", "sparse_step": 0}, "sparse_step is 0"),
    ],
)
def test_bad_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    raw = make()[0] | change
    with pytest.raises(BrokenAdapter, match=message):
        parse_mixlora({k: v for k, v in raw.items() if v is not None}, "here")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_config_is_written_as_it_is_read(strategy: Strategy) -> None:
    mix = parsed(strategy=strategy)
    written = json.loads(json.dumps(to_config(mix)))
    assert parse_mixlora(written, "here") == mix
    common = {"bias", "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha",
              "lora_dropout", "target_modules", "routing_strategy", "num_experts"}  # fmt: skip
    own = {
        "mixlora": {"act_fn", "top_k"},
        "mixlora-dynamic": {"act_fn", "top_p", "temperature"},
        "mixlora-switch": {"act_fn", "expert_capacity"},
        "loramoe": set(),
        "mola": {"top_k"},
    }
    assert written.keys() == common | own[strategy]


@pytest.mark.parametrize(
    "change",
    [
        {"router_loss": False}, {"router_aux_loss_coef": 0.01}, {"router_z_loss_coef": 0.0},
        {"router_init_range": 0.3}, {"jitter_noise": 0.2}, {"act_fn": None}, {"base": None},
        {"revision": "c0ffee"},
        {"task_type": None}, {"routing": Switch(7, 0.1, 3)}, {"routing": TopP(0.5, 2.0)},
        {"experts": LoraPart(2, 1.5, 0.0, use_rslora=True)},
        {"attention": LoraPart(4, 8.0, use_dora=True, use_rslora=True)},
    ],
)  # fmt: skip
def test_what_is_not_the_default_is_written_and_nothing_is_null(change: dict[str, Any]) -> None:
    mix = replace(parsed(), **change)
    written = to_config(mix)
    assert parse_mixlora(written, "here") == mix
    assert None not in written.values()
    assert None not in written.get("expert_lora", {}).values()


# Names


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_todays_names_stay(strategy: Strategy) -> None:
    mix, shapes = read(strategy)
    assert modern_names(shapes, mix) == {name: name for name in shapes}


@pytest.mark.parametrize("old_proj", [True, False])
def test_the_first_checkpoints_get_todays_names(old_proj: bool) -> None:
    config, tensors = legacy(make(), old_proj=old_proj)
    mix = parse_mixlora(config, "here")
    names = modern_names(tensors, mix)
    proj = "w2_proj" if old_proj else "down_proj"
    assert names["mixlora.layers.1.gate.weight"] == "mixlora.layers.1.mlp.moe_gate.weight"
    assert (
        names[f"mixlora.layers.1.experts.3.{proj}.lora_B.weight"]
        == "mixlora.layers.1.mlp.down_proj.experts.3.lora_B.weight"
    )
    assert set(names.values()) == set(make()[1])
    assert mix == parse_mixlora(make()[0], "here")


def test_layers_without_experts_have_plain_lora_in_the_feed_forward() -> None:
    config, tensors = legacy(make("mixlora-switch", layers=4), sparse_step=2)
    mix = parse_mixlora(config, "here")
    names = modern_names(tensors, mix)
    assert (
        names["mixlora.layers.2.self_attn.w1_proj.lora_A.weight"]
        == "mixlora.layers.2.mlp.gate_proj.lora_A.weight"
    )
    assert names["mixlora.layers.2.self_attn.q_proj.lora_A.weight"].endswith(
        "self_attn.q_proj.lora_A.weight"
    )
    assert [mix.has_experts(layer) for layer in range(4)] == [False, True, False, True]
    shapes = {names[k]: tuple(v.shape) for k, v in tensors.items()}
    check_shapes(mix, shapes, "here")
    assert settled(mix, shapes) == mix


def test_w1_w2_w3_and_the_prefix_of_plain_lora_are_known() -> None:
    mix = parsed()
    old = ["mixlora.layers.0.experts.0.w3.lora_A.weight",
           "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]  # fmt: skip
    assert list(modern_names(old, mix).values()) == [
        f"{FIRST}.up_proj.experts.0.lora_A.weight",
        "mixlora.layers.0.self_attn.q_proj.lora_A.weight",
    ]


def test_half_of_each_layout_is_refused_with_examples() -> None:
    _, shapes = read()
    _, old = legacy(make())
    mixed = {k: v for k, v in shapes.items() if ".layers.0." in k}
    mixed |= {k: tuple(v.shape) for k, v in old.items() if ".layers.1." in k}
    with pytest.raises(BrokenAdapter) as caught:
        modern_names(mixed, parsed())
    assert "mixlora.layers.1.gate.weight" in str(caught.value)
    assert "mixlora.layers.0.mlp." in str(caught.value)


def test_two_names_for_one_tensor_are_refused() -> None:
    names = [f"mixlora.layers.0.experts.0.{p}.lora_A.weight" for p in ("w1", "gate_proj")]
    with pytest.raises(BrokenAdapter, match=r"both mean mixlora\.layers\.0\.mlp\.gate_proj"):
        modern_names(names, parsed())


def test_the_tensors_decide_whether_sparse_step_was_followed() -> None:
    mix, shapes = read("mixlora-switch", sparse_step=2)
    assert not mix.has_experts(0)
    check_shapes(mix, shapes, "here")
    assert settled(mix, shapes).routing == Switch(8)
    assert settled(mix, shapes).has_experts(0)


# Shapes


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_m_lora_saves_fits(strategy: Strategy, dora: bool) -> None:
    mix, shapes = read(strategy, dora=dora, kv=16)
    check_shapes(mix, shapes, "here")
    assert widths(mix, shapes) == (32, 48)


def test_experts_of_their_own_rank_fit() -> None:
    mix, shapes = read(expert_lora={"r": 2})
    check_shapes(mix, shapes, "here")
    assert shapes[f"{FIRST}.up_proj.experts.1.lora_A.weight"] == (2, 32)


@pytest.mark.parametrize("targets", [ATTENTION, MLP, ("down_proj",), ("q_proj", "up_proj")])
def test_some_modules_alone_fit(targets: tuple[str, ...]) -> None:
    check_shapes(*read(targets=targets), "here")


Change = Callable[[Shapes], Any]


def gone(*ends: str) -> Change:
    def change(shapes: Shapes) -> None:
        found = [name for name in shapes if any(end in name for end in ends)]
        assert found
        for name in found:
            del shapes[name]

    return change


def put(name: str, *shape: int) -> Change:
    return lambda shapes: shapes.update({name: shape})


@pytest.mark.parametrize(
    ("strategy", "change", "message"),
    [
        ("mixlora", gone("experts.3"), r"down_proj lacks expert 3"),
        ("mixlora", gone("layers.1.mlp.moe_gate"), r"layer 1: mlp has no moe_gate\.weight"),
        ("loramoe", gone("layers.1.mlp.up_proj.moe_gate"), "layer 1: mlp.up_proj has no moe_gate"),
        ("mola", gone("0.self_attn.q_proj.moe_gate"), "layer 0: self_attn.q_proj has no moe_gate"),
        ("mola", gone("layers.0.self_attn.q_proj.experts"), "layer 0 has no LoRA of self_attn"),
        ("mixlora", gone("layers.0.mlp.up_proj"), "layer 0 has no LoRA of mlp.up_proj"),
        ("mixlora", gone("layers.1."), "there are no tensors of layer 1"),
        ("mixlora", gone("layers.0.", "layers.1."), "there are no tensors of layers 0, 1"),
        ("mixlora", gone("0.self_attn.q_proj.lora_B"), r"0\.self_attn\.q_proj\.lora_B\.weight is"),
        ("mixlora", gone("up_proj.experts.2.lora_A"), r"experts\.2\.lora_A\.weight is missing"),
        ("mixlora", gone("mixlora"), "it holds no tensors"),
        (
            "mixlora",
            put(f"{FIRST}.moe_gate.weight", 5, 32),
            r"moe_gate\.weight is for 5 experts, and num_experts says 4",
        ),
        (
            "mixlora",
            put(f"{FIRST}.moe_gate.weight", 4, 31),
            r"hidden size of 32, mixlora\.layers\.0\.mlp\.moe_gate\.weight of 31",
        ),
        (
            "mola",
            put("mola.layers.0.mlp.down_proj.moe_gate.weight", 4, 32),
            r"down_proj\.experts\.0\.lora_A\.weight and .*belong to one module, and one is 48 wide",
        ),
        (
            "mixlora",
            put(f"{FIRST}.up_proj.experts.1.lora_B.weight", 40, 4),
            r"up_proj\.experts\.0\.lora_B\.weight and .*experts\.1\.lora_B\.weight belong to one",
        ),
        (
            "mixlora",
            put(f"{FIRST}.up_proj.experts.1.lora_A.weight", 8, 32),
            r"experts\.1\.lora_A\.weight has rank 8, and the config says 4",
        ),
        (
            "mixlora",
            put(f"{FIRST}.up_proj.experts.1.lora_A.weight", 4, 32, 1),
            r"is of shape \[4, 32, 1\], not of 2 dimensions",
        ),
        ("mixlora", put(f"{FIRST}.moe_gate.weight", 4, 0), r"is of shape \[4, 0\]"),
        ("mixlora", put("mixlora.layers.0.norm.weight", 32), "norm.weight is no tensor of a MIX"),
        ("mixlora", put("classifier", 2, 32), "classifier is a classification head"),
        ("mixlora", put("mola.layers.0.x", 2), "mola.layers.0.x is of MOLA, and peft_type"),
        (
            "mixlora",
            put("mixlora.layers.0.self_attn.q_proj.experts.0.lora_A.weight", 4, 32),
            "q_proj.experts.0.lora_A.weight is no tensor of a MIXLORA",
        ),
        (
            "mola",
            put("mola.layers.0.self_attn.q_proj.lora_A.weight", 4, 32),
            "q_proj.lora_A.weight is no tensor of a MOLA",
        ),
        (
            "mixlora",
            put("mixlora.layers.0.self_attn.dense.lora_A.weight", 4, 32),
            "self_attn.dense has LoRA, and target_modules does not name dense",
        ),
        (
            "mixlora",
            put(f"{FIRST}.up_proj.lora_A.weight", 4, 32),
            "layer 0: mlp.up_proj has plain LoRA where experts should be",
        ),
        (
            "mixlora",
            put("mixlora.layers.0.self_attn.q_proj.lora_magnitude_vector", 32),
            "lora_magnitude_vector is there, and use_dora is off",
        ),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_configs_are_refused_by_name(
    strategy: Strategy, change: Change, message: str
) -> None:
    mix, shapes = read(strategy, layers=3)
    change(shapes)
    with pytest.raises(BrokenAdapter, match=message) as caught:
        check_shapes(mix, shapes, "there")
    assert str(caught.value).startswith("there: ")


@pytest.mark.parametrize("experts", [3, 6])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_number_of_experts_is_told_once(strategy: Strategy, experts: int) -> None:
    mix, shapes = read(strategy, experts=experts)
    with pytest.raises(BrokenAdapter) as caught:
        check_shapes(replace(mix, num_experts=4), shapes, "here")
    assert str(caught.value).splitlines()[1:] == [
        f"  num_experts says 4, and the tensors have {experts} experts"
    ]


def test_experts_beyond_their_number_are_named() -> None:
    mix, shapes = read()
    for leaf, shape in (("A", (4, 32)), ("B", (48, 4))):
        shapes[f"{FIRST}.up_proj.experts.9.lora_{leaf}.weight"] = shape
    with pytest.raises(BrokenAdapter, match=r"mlp\.up_proj has expert 9, and num_experts says 4"):
        check_shapes(mix, shapes, "here")


def test_a_layer_that_sparse_step_leaves_out_has_no_experts() -> None:
    config, tensors = legacy(make("mixlora-switch", layers=4), sparse_step=2)
    mix = parse_mixlora(config, "here")
    shapes = {new: tuple(tensors[old].shape) for old, new in modern_names(tensors, mix).items()}
    shapes["mixlora.layers.2.mlp.moe_gate.weight"] = (4, 32)
    with pytest.raises(BrokenAdapter, match="layer 2 has experts, and by sparse_step it has none"):
        check_shapes(mix, shapes, "here")


def test_dora_without_magnitudes_is_refused_in_words() -> None:
    mix, shapes = read(use_dora=True)
    with pytest.raises(BrokenAdapter, match="lora_magnitude_vector is missing") as caught:
        check_shapes(mix, shapes, "here")
    assert "and 48 more" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 10
    assert caught.value.hint is not None
    assert "never saved DoRA's magnitudes" in caught.value.hint


# As one of many adapters


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_facts_come_from_config_and_header(strategy: Strategy, tmp_path: Path) -> None:
    config, tensors = make(strategy, kv=16, expert_lora={"r": 2} if "mix" in strategy else None)
    found = read_facts(save(tmp_path, (config, tensors)))
    modules = {m.name: m for m in found.modules}
    assert len(modules) == 14
    up = modules["model.layers.1.mlp.up_proj"]
    rank = 2 if "mix" in strategy else 4
    assert (up.kind, up.rank, up.fan_in, up.fan_out, up.scaling) == ("experts", rank, 32, 48, 8 / 4)
    key = modules["model.layers.0.self_attn.k_proj"]
    kind = "experts" if strategy == "mola" else "linear"
    assert (key.kind, key.rank, key.fan_in, key.fan_out) == (kind, 4, 32, 16)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert len(found.other_tensors) == len(tensors) - 28
    assert found.rank == 4


def test_facts_of_the_first_layout_are_todays(tmp_path: Path) -> None:
    new = read_facts(save(tmp_path / "new", make()))
    old = read_facts(save(tmp_path / "old", legacy(make())))
    shape = [(m.name, m.kind, m.rank, m.fan_in, m.fan_out, m.scaling) for m in new.modules]
    assert [(m.name, m.kind, m.rank, m.fan_in, m.fan_out, m.scaling) for m in old.modules] == shape
    assert old.modules[0].key_a == "mixlora.layers.0.experts.0.w2_proj.lora_A.weight"


def test_a_pickle_is_told_of_from_its_config(tmp_path: Path) -> None:
    found = read_facts(save(tmp_path, legacy(make()), pickled=True))
    assert (found.weights, found.modules, found.rank) == ("pickle", (), 4)
    assert found.targets == tuple(sorted(ATTENTION + MLP))


def test_a_bad_config_is_refused_even_beside_a_pickle(tmp_path: Path) -> None:
    with pytest.raises(BrokenAdapter, match="top_k is 9, and num_experts is 4"):
        read_facts(save(tmp_path, make(top_k=9), pickled=True))


def test_a_file_cut_off_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, make()) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BrokenAdapter, match="bytes long where its header promises"):
        read_facts(tmp_path)


def test_its_shapes_are_held_against_a_bases(tmp_path: Path) -> None:
    folder = save(tmp_path / "mix", make(layers=1))
    one = Member("mix", "k", "./mix", folder, read_facts(folder), "mistralai/Mistral-7B-v0.1")
    right = {"model.layers.0.mlp.up_proj.weight": (48, 32)}
    base = BaseFacts(name="mistralai/Mistral-7B-v0.1", revision=None, digest=None, shapes=right)
    check_base([one], base)
    wrong = {"model.layers.0.mlp.up_proj.weight": (64, 32)}
    with pytest.raises(IncompatibleAdapters, match="up_proj is 48x32 in the adapter and 64x32"):
        check_base([one], replace(base, shapes=wrong))
    with pytest.raises(IncompatibleAdapters, match="it is MIXLORA: its experts"):
        check_sum([one])
