"""``MIXLORA`` as PEFT loads and saves it: what it computes, how it is handled, what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from lorahub_registry.errors import IncompatibleAdapters, LoraregError, UsageError
from lorahub_registry.runtime.mixlora import MixLoraConfig
from lorahub_registry.runtime.moe_layer import layers_of
from tests.mixlora import ATTENTION, MLP, legacy, make, save
from tests.runtime.moe_making import (
    IDS,
    LOUD,
    ROUTED,
    base,
    by_hand,
    checkpoint,
    load,
    logits,
    tree,
)

pytestmark = pytest.mark.filterwarnings("ignore")
STEP = {"expert_capacity": 2, "layers": 2, **LOUD}


def fresh(**more: Any) -> MixLoraConfig:
    said: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "num_experts": 4, "top_k": 2,
        "target_modules": [*ATTENTION, *MLP], "task_type": "CAUSAL_LM", **more,
    }  # fmt: skip
    return MixLoraConfig(**said)


def shaken(model: Any) -> Any:
    """It, with every adapter's B away from 0."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) / 5)
    return model.eval()


CASES: dict[str, dict[str, Any]] = {
    "top-k": {},
    "one of one": {"experts": 1, "top_k": 1},
    "all": {"top_k": 4},
    "top-p": {"strategy": "mixlora-dynamic"},
    "switch": {"strategy": "mixlora-switch", "expert_capacity": 2},
    "expert_lora": {"expert_lora": {"r": 3, "lora_alpha": 12}},
    "rslora": {"use_rslora": True},
    "dora": {"dora": True},
    "no up": {"targets": (*ATTENTION, "gate_proj", "down_proj")},
    "mlp alone": {"targets": MLP},
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_native_folder_is_the_formula_in_float64(
    case: str, pickled: bool, tmp_path: Path
) -> None:
    made = make(**{"strategy": "mixlora", **LOUD, **CASES[case]})
    exact = base().double()
    bare = logits(exact)
    with by_hand(exact, made):
        wanted = logits(exact)
    found = logits(load(save(tmp_path / "a", made, pickled=pickled)).double())
    assert not torch.allclose(wanted, bare, atol=1e-2)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 if "dora" not in case else 1e-5)


@pytest.mark.parametrize("step", [None, 2])
@torch.no_grad()
def test_first_checkpoints_and_their_sparse_step(step: int | None, tmp_path: Path) -> None:
    made = make("mixlora-switch", **STEP)
    old = legacy(made, sparse_step=step)
    tensors = dict(made[1])
    for name in list(tensors):  # layer 0 has the first expert as plain LoRA
        if step and name.startswith("mixlora.layers.0.mlp"):
            value = tensors.pop(name)
            if ".experts.0." in name:
                tensors[name.replace(".experts.0", "")] = value
    exact = base().double()
    with by_hand(exact, (made[0], tensors)):
        wanted = logits(exact)
    model = load(save(tmp_path / "old", old))
    torch.testing.assert_close(logits(model.double()), wanted, rtol=1e-9, atol=1e-9)
    model = load(tmp_path / "old")
    model.save_pretrained(tmp_path / "new")
    assert all(n.startswith("mixlora.layers.") for n in load_file(
        tmp_path / "new" / "adapter_model.safetensors"))  # fmt: skip
    assert torch.equal(logits(load(tmp_path / "new")), logits(model))


@torch.no_grad()
def test_a_step_that_the_tensors_do_not_follow_is_none(tmp_path: Path) -> None:
    said = checkpoint(tmp_path, "mixlora-switch", sparse_step=2)
    plain = checkpoint(tmp_path, "mixlora-switch")
    assert torch.equal(logits(load(said)), logits(load(plain)))


@torch.no_grad()
def test_targets_as_an_object_are_those_that_are_on(tmp_path: Path) -> None:
    named = {name: name != "k_proj" for name in (*ATTENTION, *MLP)}
    targets = tuple(name for name, on in named.items() if on)
    config, tensors = make("mixlora", targets=targets, **LOUD)
    one = save(tmp_path / "one", (config, tensors))
    two = save(tmp_path / "two", ({**config, "target_modules": named}, tensors))
    assert torch.equal(logits(load(one)), logits(load(two)))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {}, {"use_dora": True, "r": 1}, {"expert_lora": {"r": 2, "lora_alpha": 3}},
        {"routing_strategy": "mixlora-dynamic", "top_p": 0.6, "temperature": 0.7, "top_k": None},
        {"routing_strategy": "mixlora-switch", "expert_capacity": 3, "sparse_step": 2,
         "router_aux_loss_coef": 0.5},
    ],
)  # fmt: skip
@torch.no_grad()
def test_what_is_saved_loads_bit_equal(config: Any, pickled: bool, tmp_path: Path) -> None:
    model = shaken(get_peft_model(base(), fresh(**config)))
    model.save_pretrained(tmp_path, safe_serialization=not pickled)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    mine = replace(model.peft_config["default"].mix, act_fn="silu")  # the base's, by its name
    assert again.peft_config["default"].mix == mine
    assert not torch.equal(logits(model), logits(base()))
    again.save_pretrained(tmp_path / "again", safe_serialization=not pickled)
    name = "adapter_model.bin" if pickled else "adapter_model.safetensors"
    read = torch.load if pickled else load_file
    first, second = read(tmp_path / name), read(tmp_path / "again" / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in first.values())


@torch.no_grad()
def test_a_new_one_is_the_base(tmp_path: Path) -> None:
    model = get_peft_model(base(), fresh()).eval()
    torch.testing.assert_close(logits(model), logits(base()), rtol=1e-5, atol=1e-4)
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("targets", [("up_proj",), ("q_proj", "up_proj")])
@torch.no_grad()
def test_rows_with_experts_and_no_lora_beside_them(targets: Any, tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, seed=1, targets=targets), adapter_name="one")
    model.load_adapter(str(checkpoint(tmp_path, seed=2, targets=("down_proj",))), "two")
    names = ["two", "__base__", "one"]
    found = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            wanted = logits(base(), IDS[row : row + 1])
        else:
            model.set_adapter(name)
            wanted = logits(model, IDS[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-4)
    given = {"adapter_names": names, "max_new_tokens": 2, "do_sample": False}
    assert model.generate(input_ids=IDS, **given).shape == (3, 9)
    with pytest.raises(ValueError, match="no adapter is called three"):
        logits(model, adapter_names=["one", "two", "three"])


@torch.no_grad()
def test_two_adapters_by_turns_and_row_by_row(tmp_path: Path) -> None:
    bare = logits(base())
    folders = [
        checkpoint(tmp_path, "mixlora", experts=3, seed=1),
        checkpoint(tmp_path, "mixlora-switch", experts=5, r=2, seed=2),
    ]
    alone = [logits(load(folder)) for folder in folders]
    model = load(folders[0], adapter_name="one")
    model.load_adapter(str(folders[1]), adapter_name="two")
    assert torch.equal(logits(model), alone[0])
    model.set_adapter("two")
    assert torch.equal(logits(model), alone[1])
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), alone[1])
    mask = torch.ones_like(IDS)
    for mixed in (["one", "__base__", "two"], ["two", "two", "one"]):
        found = logits(model, adapter_names=mixed, attention_mask=mask)
        for row, name in enumerate(mixed):
            wanted = bare if name == "__base__" else alone[["one", "two"].index(name)]
            torch.testing.assert_close(found[row], wanted[row], rtol=1e-5, atol=1e-4)
    before = tree(model)
    with pytest.raises(Exception, match=r"names|adapter"):
        logits(model, adapter_names=["one", "two"])
    with pytest.raises(ValueError, match="no adapter is called three"):
        logits(model, adapter_names=["one", "two", "three"])
    assert tree(model) == before
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(IncompatibleAdapters, match="one, two are active together"):
        logits(model)
    model.set_adapter("two")
    assert torch.equal(logits(model), alone[1])
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(logits(model), alone[0])
    assert not [name for name in model.state_dict() if ".two" in name]
    assert torch.equal(logits(model.unload()), bare)


@torch.no_grad()
def test_what_is_taken_off_leaves_nothing(tmp_path: Path) -> None:
    folder, clean = checkpoint(tmp_path), base().requires_grad_(False)
    before = tree(clean)
    assert tree(load(folder, clean).unload()) == before
    model = load(folder, clean)
    assert clean._forward_hooks
    wanted = logits(model)
    model.delete_adapter("default")
    assert not clean._forward_hooks
    assert not clean._forward_pre_hooks
    assert torch.equal(logits(clean), logits(base()))
    model.load_adapter(str(folder), adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(logits(model), wanted)


def test_what_it_cannot_do_it_says(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path), adapter_name="one")
    model.load_adapter(str(checkpoint(tmp_path, seed=2)), adapter_name="two")
    for attempt in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.add_weighted_adapter(["one", "two"], [1, 1], "both"),
    ):
        with pytest.raises(ValueError, match="MixLoRA cannot be merged"):
            attempt()
    with torch.no_grad():
        assert logits(model).isfinite().all()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_stands_alone(way: Any, tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "mixlora-switch"), is_trainable=True).train()
    mask = (IDS != 9).long()

    def losses(model: Any) -> list[float]:
        out = model(input_ids=IDS, attention_mask=mask, labels=IDS)
        return [float(out.loss), float(out.aux_loss), float(out.z_loss)]

    wanted = losses(model)
    copied = way(model)
    assert losses(copied) == wanted
    flows = {id(layer.flow) for _, layer in layers_of(copied)}
    assert len(flows) == 1
    assert flows == {id(copied.base_model._flow)} != {id(model.base_model._flow)}
    copied.unload()
    assert not copied.base_model.model._forward_hooks
    assert losses(model) == wanted


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_experts_are_float32_on_any_base(dtype: torch.dtype, low: bool, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, dtype=dtype)
    wide = logits(load(folder))
    model = load(folder, base().bfloat16(), low_cpu_mem_usage=low)
    later = load(folder).to(torch.bfloat16)
    for one in (model, later):
        experts = [p for n, p in one.named_parameters() if "lora_experts" in n]
        assert {p.dtype for p in experts} == {torch.float32}
        assert {p.device.type for p in experts} == {"cpu"}
        found = logits(one)
        assert found.dtype == torch.bfloat16
        assert float((found.float() - wide).std()) < 0.3 * float(wide.std())
    assert torch.equal(logits(load(folder, low_cpu_mem_usage=low)), wide)
    for n, p in load(folder, base().double()).double().named_parameters():
        assert p.dtype == torch.float64, n


def test_a_second_adapter_leaves_the_first_training(tmp_path: Path) -> None:
    model = get_peft_model(base(), fresh())
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_adapter(str(checkpoint(tmp_path, experts=3)), adapter_name="other")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    model.set_adapter("other", inference_mode=True)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.set_adapter("other")
    found = [n for n, p in model.named_parameters() if p.requires_grad]
    assert found
    assert all(".other" in name for name in found)


def _without(name: str) -> Any:
    return lambda config, tensors: tensors.pop(name)


def _set(**said: Any) -> Any:
    return lambda config, tensors: config.update(said)


GATE = "mixlora.layers.1.mlp.moe_gate.weight"
FACTOR = "mixlora.layers.1.mlp.up_proj.experts.2.lora_B.weight"
BAD: dict[str, Any] = {
    "rank": lambda _, tensors: tensors.update({FACTOR: torch.zeros(48, 3)}),
    "num_experts": _set(num_experts=5),
    "gate": _without(GATE),
    "factor": _without(FACTOR),
    "top_k": _set(top_k=9),
    "NaN": lambda _, tensors: tensors[FACTOR].fill_(torch.nan),
    "half legacy": lambda _, tensors: tensors.update(
        {"mixlora.layers.1.gate.weight": tensors.pop(GATE)}
    ),
    "beyond": lambda _, tensors: tensors.update(
        {k.replace("layers.1", "layers.2"): v.clone() for k, v in list(tensors.items())}
    ),
    "targets": _set(target_modules=["q_proj", "nothing"]),
    "modules_to_save": _set(modules_to_save=["lm_head"]),
    "rank_pattern": _set(rank_pattern={"q_proj": 2}),
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("bad", [*BAD, "width", "memory"])
def test_what_cannot_be_loaded_changes_nothing(
    bad: str, second: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = make("mixlora", hidden=40 if bad == "width" else 32, **LOUD)
    BAD.get(bad, lambda *_: None)(config, tensors)
    folder = save(tmp_path / "bad", (config, tensors))
    model = base().requires_grad_(False)  # PEFT freezes it, whatever comes of the adapter
    if second:
        model = load(checkpoint(tmp_path), model, is_trainable=True, adapter_name="first")
    before, wanted = tree(model), logits(model)
    if bad == "memory":
        free = type("Free", (), {"available": 1000})
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    more = {"adapter_name": "other"}
    with pytest.raises(LoraregError):
        model.load_adapter(str(folder), **more) if second else load(folder, model)
    model.eval()
    assert tree(model) == before
    assert torch.equal(logits(model), wanted)


def test_other_ways_to_inject_are_refused(tmp_path: Path) -> None:
    folder, model = checkpoint(tmp_path), base()
    for trainable in (False, True):
        with pytest.raises(IncompatibleAdapters, match="load_adapter and add_adapter do not know"):
            model.load_adapter(str(folder), is_trainable=trainable)
    with pytest.raises(IncompatibleAdapters, match="would never be loaded"):
        inject_adapter_in_model(fresh(), base())
    model = get_peft_model(base(), fresh(inference_mode=True))
    with pytest.raises(IncompatibleAdapters, match="never loaded"):
        logits(model)


def test_beside_other_types_it_is_refused(tmp_path: Path) -> None:
    plain = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(IncompatibleAdapters, match="adapters of another PEFT type"):
        load(checkpoint(tmp_path), plain.base_model.model)


def test_plain_lora_in_place_of_experts_stands_alone(tmp_path: Path) -> None:
    everywhere = checkpoint(tmp_path)
    sparse = save(tmp_path / "s", legacy(make("mixlora-switch", **STEP), sparse_step=2))
    for first, second in ((everywhere, sparse), (sparse, everywhere)):
        model = load(first)
        before = logits(model)
        with pytest.raises(IncompatibleAdapters, match="sparse_step"):
            model.load_adapter(str(second), adapter_name="two")
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("said", [{"modules_to_save": ["lm_head"]}, {"layers_to_transform": [0]},
                                  {"init_lora_weights": "pissa"}])  # fmt: skip
def test_what_a_file_cannot_say_is_refused(said: Any) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(said))} is"):
        get_peft_model(base(), fresh(**said))


def test_a_head_is_refused() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForSequenceClassification(base().config)
    with pytest.raises(UsageError, match="modules_to_save"):
        get_peft_model(model, fresh(task_type="SEQ_CLS"))


@pytest.mark.parametrize("strategy", ROUTED)
@torch.no_grad()
def test_whoever_watches_sees_every_layer(strategy: str, tmp_path: Path) -> None:
    model, seen = load(checkpoint(tmp_path, strategy)), []
    mask = (IDS != 9).long()
    with model.base_model.watching(lambda *said: seen.append(said)):
        logits(model, attention_mask=mask)
    logits(model)
    assert [(adapter, layer) for adapter, layer, *_ in seen] == [("default", 0), ("default", 1)]
    for _, _, given, chosen, real in seen:
        assert given.shape == (IDS.numel(), 4)
        assert int(chosen.counts.sum()) == len(chosen.token)
        assert torch.equal(real, mask.flatten().bool())


def test_its_config_says_no_more_than_m_lora_knows(tmp_path: Path) -> None:
    get_peft_model(base(), fresh(act_fn="silu")).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said == {
        "bias": "none", "peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "lora_dropout": 0.0, "target_modules": sorted([*ATTENTION, *MLP]), "num_experts": 4,
        "routing_strategy": "mixlora", "act_fn": "silu", "top_k": 2,
    }  # fmt: skip
