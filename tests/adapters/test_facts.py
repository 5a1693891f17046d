"""An adapter read without loading it: the tensors decide, and PEFT agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorahub_registry.adapters.facts import digest_of, find_adapters, read_facts
from lorahub_registry.errors import BrokenAdapter, ForeignFormat, LoraregError, UnknownRef
from tests import tiny
from tests.adapters.making import Q, V, adapter, lora


def test_modules_are_what_the_tensors_say(tmp_path: Path) -> None:
    tensors = lora((Q,), rank=4, fan_in=8, fan_out=6) | lora((V,), rank=2, fan_in=8, fan_out=3)
    found = read_facts(adapter(tmp_path, tensors, rank_pattern={"v_proj": 2}))
    assert [(m.name, m.rank, m.fan_in, m.fan_out, m.scaling) for m in found.modules] == [
        (Q, 4, 8, 6, 2.0),
        (V, 2, 8, 3, 4.0),
    ]
    assert found.ranks == {2: 1, 4: 1}
    assert found.rank == 4
    assert found.targets == ("q_proj", "v_proj")
    assert found.parameters == 4 * 8 + 6 * 4 + 2 * 8 + 3 * 2
    assert found.dtype == "F32"
    assert found.other_tensors == ()


def test_ranks_other_than_the_configs_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path, lora(rank=16), r=8)
    with pytest.raises(BrokenAdapter, match=f"{Q} has rank 16, but .* says 8"):
        read_facts(folder)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.m.lora_A.weight",
        "base_model.model.m.lora_A.default.weight",
        "m.lora_A.weight",
        "m.lora_A",
    ],
)
def test_keys_of_every_age_of_peft_are_read(tmp_path: Path, name: str) -> None:
    tensors = {
        name: ("F32", [4, 8], bytes(128)),
        name.replace("lora_A", "lora_B"): ("F32", [8, 4], bytes(128)),
    }
    (module,) = read_facts(adapter(tmp_path, tensors)).modules
    assert (module.name, module.kind, module.key_a) == ("m", "linear", name)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    tensors = lora((Q,))
    tensors.pop(f"base_model.model.{Q}.lora_B.weight")
    with pytest.raises(BrokenAdapter, match=f"{Q} has no lora_B"):
        read_facts(adapter(tmp_path, tensors))


def test_factors_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    tensors = lora((Q,)) | {f"base_model.model.{Q}.lora_B.weight": ("F32", [8, 3], bytes(96))}
    with pytest.raises(BrokenAdapter, match="do not fit"):
        read_facts(adapter(tmp_path, tensors))


def test_a_module_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    tensors = lora((Q,)) | {f"{Q}.lora_A.weight": ("F32", [4, 8], bytes(128))}
    with pytest.raises(BrokenAdapter, match="twice"):
        read_facts(adapter(tmp_path, tensors))


def test_rank_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenAdapter, match="do not fit"):
        read_facts(adapter(tmp_path, lora((Q,), rank=0)))


def test_a_lora_config_beside_other_tensors_is_foreign(tmp_path: Path) -> None:
    tensors = {"model.layers.0.self_attn.q_proj.weight": ("F32", [2], bytes(8))}
    with pytest.raises(ForeignFormat, match="no lora_A / lora_B"):
        read_facts(adapter(tmp_path, tensors))


def test_patterns_that_would_take_long_on_that_many_modules_are_refused(tmp_path: Path) -> None:
    modules = tuple(f"m{n}" + ".a" * 250 for n in range(20))
    slow = {".*.*.*x": 4}
    with pytest.raises(BrokenAdapter, match="too long on 20 modules"):
        read_facts(adapter(tmp_path, lora(modules), rank_pattern=slow))
    names = tuple(f"model.layers.{n}.self_attn.q_proj" for n in range(80))
    found = read_facts(adapter(tmp_path, lora(names), rank_pattern=slow))
    assert len(found.modules) == 80


def test_a_pickle_is_seen_and_not_read(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    assert read_facts(folder).weights == "none"
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n")
    found = read_facts(folder)
    assert (found.weights, found.bytes, found.modules) == ("pickle", 16, ())
    assert (found.rank, found.targets) == (4, ("q_proj", "v_proj"))
    assert digest_of(folder) is None


def test_a_folder_without_config_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UnknownRef, match=r"no adapter_config\.json"):
        read_facts(tmp_path)


def test_adapters_are_found_below_a_folder_and_links_are_not_followed(tmp_path: Path) -> None:
    for name in ("b", "a/deep", ".hidden/c", "a/.git/d"):
        adapter(tmp_path / "root" / name)
    adapter(tmp_path / "outside")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root", target_is_directory=True)
    (tmp_path / "root" / "out").symlink_to(tmp_path / "outside", target_is_directory=True)
    found = find_adapters(tmp_path / "root")
    assert [str(f.relative_to(tmp_path / "root")) for f in found] == ["a/deep", "b"]


@pytest.mark.parametrize(
    "kind", ["plain", "wide", "head", "rslora", "patterns", "rslora-patterns", "dora", "bias"]
)
def test_ranks_and_scalings_are_those_of_peft_itself(tiny_llama: tiny.Tiny, kind: str) -> None:
    ours = {m.name: (m.rank, m.scaling) for m in read_facts(tiny_llama.adapter(kind)).modules}
    layers = tiny.tuned_layers(tiny_llama.peft(kind), kind)
    theirs = {n: (layer.r[kind], pytest.approx(layer.scaling[kind])) for n, layer in layers.items()}
    assert ours == theirs


def test_what_peft_saves_beside_the_factors_is_listed(tiny_llama: tiny.Tiny) -> None:
    def others(kind: str) -> list[str]:
        return [n.rsplit(".", 1)[-1] for n in read_facts(tiny_llama.adapter(kind)).other_tensors]

    assert others("plain") == []
    assert others("dora") == ["lora_magnitude_vector"] * 2
    assert others("modules_to_save") == ["weight"]
    assert others("lora_bias") == ["bias"] * 2
    kinds = {m.kind for m in read_facts(tiny_llama.adapter("embedding")).modules}
    assert kinds == {"linear", "embedding"}


@pytest.mark.parametrize(("kind", "peft_type"), [("ia3", "IA3"), ("adalora", "ADALORA")])
def test_other_kinds_have_no_modules(tiny_llama: tiny.Tiny, kind: str, peft_type: str) -> None:
    found = read_facts(tiny_llama.adapter(kind))
    assert (found.config.peft_type, found.modules) == (peft_type, ())
    assert found.other_tensors


WILD = {
    "Inishpy__lerobot-libero": "no 'peft_type'",
    "branbot6__sift-opf-zh__adapter": None,
    "deepbiolab__gpt2-classification-peft__peft_model": None,
    "sherryxzhao__lora_alpaca__output": None,
    "wujindou__BLOOM-LORA": None,
}


@pytest.mark.data
def test_every_wild_adapter_is_read_or_refused_by_name(data: Path) -> None:
    said = {}
    for folder in sorted((data / "adapters" / "wild").iterdir()):
        try:
            read_facts(folder)
            said[folder.name] = None
        except LoraregError as error:
            said[folder.name] = str(error)
    assert said.keys() == WILD.keys()
    for name, words in WILD.items():
        assert (words in (said[name] or "")) if words else said[name] is None


@pytest.mark.data
def test_a_wild_gpt2_classifier_is_read_whole(data: Path) -> None:
    found = read_facts(data / "adapters/wild/deepbiolab__gpt2-classification-peft__peft_model")
    assert found.ranks == {8: 36}
    assert found.config.fan_in_fan_out
    assert found.config.unsupported == ("modules_to_save",)
    first = found.modules[0]
    assert (first.name, first.fan_in, first.fan_out) == ("transformer.h.0.attn.c_attn", 768, 2304)
    assert first.scaling == 4.0
