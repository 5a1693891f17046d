"""Published gates: what is read of them, and whether they belong to the adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, UnknownRef
from lorahub_registry.weights.convert import convert
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.gates import (
    Gates,
    check_count,
    exact_dtype,
    list_of_layers,
    read_gates,
)
from tests import tiny
from tests.adapters import making
from tests.weights import gated

WEIGHT, BIAS = "encoder.layers.%d.lora_fusion_gate.weight", "encoder.layers.%d.weight_bias"


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_gates_are_read_in_float32_layer_by_layer(tmp_path: Path, ending: str) -> None:
    # Ten is after two, and not between one and two.
    tensors = gated.gates(layers=12, experts=3, width=8)
    path = tmp_path / f"x.{ending}"
    torch.save(tensors, path) if ending == "pt" else save_file(tensors, path)
    found = read_gates(path)
    assert (found.layers, found.experts, found.width, found.biased) == (12, 3, 8, True)
    assert found.weights.dtype == found.biases.dtype == torch.float32
    for i in range(12):
        assert torch.equal(found.weights[i], tensors[WEIGHT % i].float())
        assert torch.equal(found.biases[i], tensors[BIAS % i][0].float())
    assert os.listdir(tmp_path) == [path.name]


def test_the_older_form_has_biases_of_zero(tmp_path: Path) -> None:
    found = read_gates(gated.save(gated.gates(biases=False), tmp_path / "x.pt"))
    assert found.biases.shape == (2, 2)
    assert not found.biased
    assert not found.biases.any()


def _changed(**changes: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = gated.gates()
    for key, value in changes.items():
        kind, _, layer = key.partition("_")
        name = (WEIGHT if kind == "weight" else BIAS) % int(layer)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (_changed(weight_1=torch.full((2, 32), float("nan"))), "weight holds NaN or infinity"),
        (_changed(bias_0=torch.tensor([[0.0, float("inf")]])), "weight_bias holds NaN"),
        (_changed(weight_1=torch.ones(2, 31)), "gate of layer 1 is 2x31, and that of layer 0 is"),
        (_changed(weight_0=torch.ones(32), weight_1=torch.ones(32)), "adapters x width"),
        (_changed(bias_1=torch.ones(1, 3)), "bias of layer 1 is 1x3 beside a gate for 2"),
        (_changed(bias_1=torch.tensor(1.0)), "bias of layer 1 is a single number"),
        (_changed(bias_1=None), "layer 1 has no gate or no bias"),
        (_changed(weight_0=None, bias_0=None), "not the first of a model"),
        ({}, "gates of 0 layers"),
        (gated.gates() | {"encoder.embed.weight": torch.ones(2)}, "no part of a gate"),
    ],
)
def test_what_is_no_gate_is_refused_in_words(
    tmp_path: Path, tensors: dict[str, torch.Tensor], said: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(BrokenAdapter, match=said) as caught:
        read_gates(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [gated.gates() | {"epoch": 5}, [torch.ones(2)]])
def test_a_pickle_that_holds_more_than_named_tensors_is_refused(
    tmp_path: Path, content: Any
) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BrokenAdapter, match="something else than named tensors"):
        read_gates(tmp_path / "x.pt")


def test_a_pickle_that_would_run_code_runs_none(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "canary",))

    path = gated.save(gated.gates() | {"evil": Canary()}, tmp_path / "x.pt")
    with pytest.raises(BrokenAdapter, match="cannot be read as tensors"):
        read_gates(path)
    assert not (tmp_path / "canary").exists()


def test_gates_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownRef, match="no such file"):
        read_gates(tmp_path / "x.pt")


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    path = gated.save(gated.gates(), tmp_path / "x.pt")
    with pytest.raises(BrokenAdapter, match="not read within 0 s"):
        read_gates(path, timeout_s=1e-3)


# Whether gates and adapters belong together


def _gates(layers: int = 1, experts: int = 2, width: int = 8) -> Gates:
    return Gates(torch.ones(layers, experts, width), torch.zeros(layers, experts), True)


def _member(folder: Path, *modules: str, **shape: int) -> Member:
    return making.member(making.adapter(folder, making.lora(modules, **shape)))


def test_the_list_of_layers_is_the_adapters_own(tmp_path: Path) -> None:
    modules = [f"decoder.blocks.{i}.mixer.experts.3.q_proj" for i in range(2)]
    members = [_member(tmp_path / "a", modules[0]), _member(tmp_path / "b", *modules)]
    assert list_of_layers(members, _gates(2), where="x.pt") == "decoder.blocks"


@pytest.mark.parametrize(
    ("modules", "shape", "gates", "said"),
    [
        ([making.Q], {}, _gates(2), "gates of 2 layers, and the adapters sit in 1, up to model"),
        (["model.layers.1.x"], {}, _gates(1), "gates of 1 layers, and the adapters sit in 1, up"),
        ([making.Q], {"fan_out": 16}, _gates(width=16), "of width 16, and in a .*q_proj is 16x8"),
        (["model.layers.0.up"], {"fan_out": 4}, _gates(width=16), "width 16, and in a .* is 4x8"),
        ([making.Q, "lm_head"], {}, _gates(), "lm_head is in no layer"),
        ([making.Q, "encoder.block.0.q"], {}, _gates(), "one list of layers, and a sits in"),
    ],
)
def test_gates_of_something_else_are_refused(
    tmp_path: Path, modules: list[str], shape: dict[str, int], gates: Gates, said: str
) -> None:
    with pytest.raises(IncompatibleAdapters, match=said):
        list_of_layers([_member(tmp_path / "a", *modules, **shape)], gates, where="x.pt")


def test_gates_for_another_number_of_adapters_are_refused() -> None:
    check_count(_gates(experts=3), 3, where="x.pt")
    with pytest.raises(IncompatibleAdapters, match="choose among 3 adapters, and 2 are named"):
        check_count(_gates(experts=3), 2, where="x.pt")


# What is written, and from where


def test_an_adapter_is_converted_into_another_folder(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    folder = gated.pair(tiny_llama, tmp_path) / "LoRAs" / "zh_lora"
    into = tmp_path / "into"
    into.mkdir()
    assert convert(folder, into=into) == read_facts(into)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.bin"]
    assert sorted(os.listdir(into)) == ["adapter_config.json", "adapter_model.safetensors"]
    old = torch.load(folder / "adapter_model.bin", weights_only=True)
    new = load_file(into / "adapter_model.safetensors")
    assert new.keys() == old.keys()
    assert all(torch.equal(new[k], old[k]) for k in old)


@pytest.mark.parametrize(
    ("dtypes", "alpha", "kept"),
    [
        (("float16", "float16"), 16, "float16"),
        (("bfloat16", "bfloat16"), 16, "bfloat16"),
        (("float16", "bfloat16"), 16, "float32"),
        (("float32", "float32"), 16, "float32"),
        (("float16", "float16"), 12, "float32"),
    ],
)
def test_halves_stay_halves_where_scaling_them_loses_nothing(
    tmp_path: Path, dtypes: tuple[str, str], alpha: int, kept: str
) -> None:
    members, experts = [], []
    for name, dtype in zip("ab", dtypes, strict=True):
        torch.manual_seed(3)
        folder = making.adapter(tmp_path / name, lora_alpha=alpha)
        tensors = {
            f"base_model.model.{making.Q}.lora_A.weight": torch.randn(4, 8),
            f"base_model.model.{making.Q}.lora_B.weight": torch.randn(8, 4),
        }
        cast = {k: v.to(getattr(torch, dtype)) for k, v in tensors.items()}
        save_file(cast, folder / "adapter_model.safetensors")
        members.append(making.member(folder))
        experts.append(load_deltas(folder, members[-1].facts))
    assert exact_dtype(members, experts) == kept
