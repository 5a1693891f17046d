"""MixLoRA's tensors, LoRAMoE's and MoLA's: read, written for PEFT and for m-LoRA, the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.adapters.mixlora import LoraPart, MixLora, Switch, parse_mixlora
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, LoraregError, UnknownRef
from lorahub_registry.weights.mixlora import read_any, read_mixlora, write_mixlora, write_mlora
from tests.mixlora import STRATEGIES, Made, Strategy, legacy, make, save

Tensors = dict[str, torch.Tensor]
GATE = "mixlora.layers.1.mlp.moe_gate.weight"


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_written_is_read_again(strategy: Strategy, dora: bool, tmp_path: Path) -> None:
    config, tensors = make(strategy, kv=16, dora=dora)
    mix, found = read_mixlora(save(tmp_path / "a", (config, tensors)))
    assert mix == parse_mixlora(config, "here")
    assert same(found, tensors)
    assert list(found) == sorted(found)
    write_mixlora(folder(tmp_path / "b"), mix, found)
    assert names(tmp_path / "b") == ["adapter_config.json", "adapter_model.safetensors"]
    again, twice = read_mixlora(tmp_path / "b")
    assert again == mix
    assert same(twice, tensors)
    assert read_facts(tmp_path / "b").ranks == {4: 14}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_there_and_back_through_m_loras_pickle_is_the_same_bits(
    strategy: Strategy, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"expert_lora": {"r": 2}} if "mix" in strategy else {}
    mix, tensors = read_mixlora(save(tmp_path / "a", make(strategy, router_loss=True, **own)))
    write_mlora(folder(tmp_path / "b"), mix, tensors)
    assert names(tmp_path / "b") == ["adapter_config.json", "adapter_model.bin"]
    back, found = read_any(tmp_path / "b")
    assert back == mix
    assert same(found, tensors)


def test_m_loras_pickle_is_flat_float32_of_plain_tensors(tmp_path: Path) -> None:
    mix, tensors = read_mixlora(save(tmp_path / "a", make(dtype=torch.bfloat16)))
    assert tensors[GATE].dtype == torch.bfloat16
    write_mlora(folder(tmp_path / "b"), mix, tensors)
    loaded = torch.load(tmp_path / "b" / "adapter_model.bin", weights_only=True)
    assert type(loaded) is dict
    assert same(loaded, {name: tensor.float() for name, tensor in tensors.items()})
    assert {type(tensor) for tensor in loaded.values()} == {torch.Tensor}


def test_half_precision_is_kept_for_peft(tmp_path: Path) -> None:
    _, tensors = made = make(dtype=torch.float16)
    mix, found = read_mixlora(save(tmp_path / "a", made))
    write_mixlora(folder(tmp_path / "b"), mix, found)
    assert same(read_mixlora(tmp_path / "b")[1], tensors)


@pytest.mark.parametrize(("old_proj", "pickled"), [(True, True), (True, False), (False, False)])
def test_the_first_checkpoints_are_read_by_todays_names(
    old_proj: bool, pickled: bool, tmp_path: Path
) -> None:
    config, tensors = make()
    path = save(tmp_path, legacy((config, tensors), old_proj=old_proj), pickled=pickled)
    mix, found = read_any(path)
    assert mix == parse_mixlora(config, "here")
    assert same(found, tensors)


def test_layers_without_experts_stay_so(tmp_path: Path) -> None:
    config, tensors = make("mixlora-switch", layers=4)
    path = save(tmp_path / "a", legacy((config, tensors), sparse_step=3), pickled=True)
    mix, found = read_any(path)
    assert mix.routing == Switch(8, sparse_step=3)
    first = "mixlora.layers.2.mlp.up_proj"
    assert torch.equal(found[f"{first}.lora_A.weight"], tensors[f"{first}.experts.0.lora_A.weight"])
    assert GATE in found
    assert GATE.replace(".1.", ".2.") not in found
    write_mixlora(folder(tmp_path / "b"), mix, found)
    again, twice = read_mixlora(tmp_path / "b")
    assert again == mix
    assert same(twice, found)


def test_a_sparse_step_that_nothing_followed_is_not_kept(tmp_path: Path) -> None:
    mix, tensors = read_mixlora(save(tmp_path / "a", make("mixlora-switch", sparse_step=2)))
    assert mix.routing == Switch(8)
    write_mixlora(folder(tmp_path / "b"), mix, tensors)
    assert "sparse_step" not in json.loads((tmp_path / "b" / "adapter_config.json").read_text())


def test_a_pickle_is_not_read_by_the_way(tmp_path: Path) -> None:
    path = save(tmp_path, make(), pickled=True)
    with pytest.raises(IncompatibleAdapters, match=r"a pickle \(adapter_model\.bin\)") as caught:
        read_mixlora(path)
    assert caught.value.hint == f"lorareg convert {path} FOLDER --to peft"


def test_safetensors_go_before_a_pickle(tmp_path: Path) -> None:
    made = make()
    save(tmp_path, made)
    (tmp_path / "adapter_model.bin").write_bytes(b"no pickle")
    assert same(read_any(tmp_path)[1], made[1])


def test_other_kinds_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownRef, match="no adapter_config"):
        read_mixlora(tmp_path)
    config, _ = make()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownRef, match=r"no adapter_model\.safetensors"):
        read_any(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.raises(IncompatibleAdapters, match="it is LORA, none of MIXLORA"):
        read_any(tmp_path)


def spoilt(made: Made, name: str, tensor: Any) -> Made:
    config, tensors = made
    return config, {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (spoilt(make(), GATE, torch.full((4, 32), torch.nan)), f"{GATE} holds NaN or infinity"),
        (spoilt(make(), GATE, torch.full((4, 32), -torch.inf)), f"{GATE} holds NaN or infinity"),
        (spoilt(make(), GATE, torch.ones(4, 32, dtype=torch.int32)), f"{GATE} is of torch.int32"),
        (spoilt(make(), GATE, torch.ones(4, 31)), f"hidden size of 32, {GATE} of 31"),
        (spoilt(make(), "mixlora.layers.0.gate.weight", torch.ones(4, 32)), "half of its tensors"),
        (make(num_experts=8), "num_experts says 8, and the tensors have 4 experts"),
        (make(use_dora=True), "lora_magnitude_vector is missing, and use_dora is on"),
        (make(top_k=7), "top_k is 7, and num_experts is 4"),
    ],
)
def test_bad_files_are_refused_by_name(made: Made, message: str, tmp_path: Path) -> None:
    path = save(tmp_path, made)
    with pytest.raises(BrokenAdapter, match=message) as caught:
        read_mixlora(path)
    assert str(path) in str(caught.value)


def test_a_pickles_values_are_looked_at_too(tmp_path: Path) -> None:
    made = spoilt(make(), GATE, torch.full((4, 32), torch.nan))
    path = save(tmp_path, made, pickled=True)
    with pytest.raises(BrokenAdapter, match=rf"adapter_model\.bin: {GATE} holds NaN"):
        read_any(path)


@pytest.mark.parametrize("pickled", [False, True])
def test_files_cut_off_are_refused(pickled: bool, tmp_path: Path) -> None:
    path = save(tmp_path, make(), pickled=pickled)
    file = path / ("adapter_model.bin" if pickled else "adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(BrokenAdapter, match=str(file)):
        read_any(path)


@pytest.mark.parametrize("write", [write_mixlora, write_mlora])
def test_what_cannot_be_read_again_is_not_written(write: Any, tmp_path: Path) -> None:
    config, tensors = make()
    mix = parse_mixlora(config, "here")
    for bad in ({**tensors, GATE: torch.full((4, 32), torch.nan)}, {**tensors, "x": tensors[GATE]}):
        with pytest.raises(BrokenAdapter):
            write(tmp_path, mix, bad)
    assert names(tmp_path) == []


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    config, tensors = make()
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    views = {n: p.view_as(t) for (n, t), p in zip(tensors.items(), parts, strict=True)}
    mix = parse_mixlora(config, "here")
    for write in (write_mixlora, write_mlora):
        write(tmp_path, mix, views)
    assert same(read_mixlora(tmp_path)[1], tensors)
    assert (tmp_path / "adapter_model.bin").stat().st_size < 2 * 4 * flat.numel()


def changed(strategy: Strategy = "mixlora", **changes: Any) -> tuple[MixLora, Tensors]:
    config, tensors = make(strategy)
    return replace(parse_mixlora(config, "here"), **changes), tensors


def dora() -> tuple[MixLora, Tensors]:
    config, tensors = make(dora=True)
    return parse_mixlora(config, "here"), tensors


def sparse() -> tuple[MixLora, Tensors]:
    """Experts in layer 1 alone; the others have plain LoRA."""
    config, tensors = make("mixlora-switch", layers=4, sparse_step=4)
    kept = {}
    for name, tensor in tensors.items():
        if ".mlp." not in name or ".layers.1." in name:
            kept[name] = tensor
        elif ".experts.0." in name:
            kept[name.replace(".experts.0.", ".")] = tensor
    return parse_mixlora(config, "here"), kept


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (dora(), "use_dora is on, and they read no magnitudes"),
        (sparse(), r"some layers have no experts \(sparse_step\)"),
        (changed(attention=LoraPart(4, 1.5)), "lora_alpha is 1.5, and they take whole numbers"),
        (changed(experts=LoraPart(4, 1.5)), "expert_lora's lora_alpha is 1.5"),
        (changed(target_modules=("q_proj", "wqkv")), "target_modules names wqkv"),
    ],
)
def test_what_m_loras_readers_would_read_wrongly_is_refused(
    made: tuple[MixLora, Tensors], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraregError, match=message) as caught:
        write_mlora(tmp_path, *made)
    assert isinstance(caught.value, IncompatibleAdapters)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("made", "note"),
    [
        (changed("mixlora-switch"), "routing_strategy mixlora-switch"),
        (changed("mola"), "routing_strategy mola"),
        (changed(experts=LoraPart(4, 16.0)), "expert_lora"),
        (changed(attention=LoraPart(4, 8.0), experts=LoraPart(4, 8.0)), "a lora_dropout of 0"),
        (changed(act_fn=None), "a config without act_fn"),
        (changed(base=None), "a config without base_model_name_or_path"),
    ],
)
def test_what_mixlora_alone_does_not_read_is_said(
    made: tuple[MixLora, Tensors], note: str, tmp_path: Path
) -> None:
    [said] = write_mlora(tmp_path, *made)
    assert said == f"load it with the package moe_peft: the package mixlora does not read {note}"


def test_m_loras_readers_always_find_a_task_type(tmp_path: Path) -> None:
    assert write_mlora(tmp_path, *changed(task_type=None)) == ()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
