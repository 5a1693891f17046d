"""PEFT's files, read and written without PEFT: PEFT is the judge of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.errors import BrokenAdapter
from lorahub_registry.weights.files import load_deltas, load_factors, save_adapter, short_targets
from lorahub_registry.weights.lowrank import LowRank, truncate, weighted_sum
from tests import tiny

KINDS = ["plain", "wide", "head", "rslora", "patterns", "rslora-patterns"]


def deltas(model: tiny.Tiny, kind: str) -> dict[str, LowRank]:
    folder = model.adapter(kind)
    return load_deltas(folder, read_facts(folder))


def pefts_own(model: tiny.Tiny, kind: str) -> dict[str, torch.Tensor]:
    """What PEFT itself would add to each weight, float64 from its float32."""
    layers = tiny.tuned_layers(model.peft(kind), kind)
    return {name: layer.get_delta_weight(kind).double() for name, layer in layers.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_are_those_that_peft_computes(tiny_llama: tiny.Tiny, kind: str) -> None:
    ours, theirs = deltas(tiny_llama, kind), pefts_own(tiny_llama, kind)
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        # Float32 rounding: B·A once, the scaling before or after it.
        torch.testing.assert_close(delta.dense().double(), theirs[name], rtol=1e-5, atol=1e-6)
        assert delta.a.dtype == delta.b.dtype == torch.float32


def test_conv1d_deltas_are_those_of_peft_transposed(tiny_gpt2: tiny.Tiny) -> None:
    theirs = pefts_own(tiny_gpt2, "gpt2")
    for name, delta in deltas(tiny_gpt2, "gpt2").items():
        torch.testing.assert_close(delta.dense().T.double(), theirs[name], rtol=1e-5, atol=1e-6)


def test_seq2seq_deltas_are_those_of_peft(tiny_t5: tiny.Tiny) -> None:
    theirs = pefts_own(tiny_t5, "t5")
    ours = deltas(tiny_t5, "t5")
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        torch.testing.assert_close(delta.dense().double(), theirs[name], rtol=1e-5, atol=1e-6)


def test_factors_are_the_files_own_with_the_scaling_beside(tiny_llama: tiny.Tiny) -> None:
    folder = tiny_llama.adapter("plain")
    raw = load_file(folder / "adapter_model.safetensors")
    for name, (a, b, scaling) in load_factors(folder, read_facts(folder)).items():
        assert torch.equal(a, raw[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(b, raw[f"base_model.model.{name}.lora_B.weight"])
        assert scaling == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_its_name(
    tiny_llama: tiny.Tiny, tmp_path: Path, value: float
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_llama.adapter("plain"), folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = sorted(tensors)[3]
    tensors[key][1, 1] = value
    save_file(tensors, file)
    with pytest.raises(BrokenAdapter, match=f"{key} holds NaN or infinity"):
        load_deltas(folder, read_facts(folder))


def test_half_precision_files_are_read_as_float32(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_llama.adapter("plain"), folder)
    file = folder / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    found = load_deltas(folder, read_facts(folder))
    assert {d.a.dtype for d in found.values()} == {torch.float32}


def written(model: tiny.Tiny, folder: Path, mixture: dict[str, LowRank], **more: Any) -> Path:
    folder.mkdir(parents=True)
    modules = model.base().linear_modules()
    save_adapter(
        folder, mixture, base=model.name, base_revision=None, task_type="CAUSAL_LM",
        all_modules=modules.keys(), **more,
    )  # fmt: skip
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43)[None] % 250 + 3
    with torch.inference_mode():
        return model(input_ids=ids).logits


def from_stock_peft(model: tiny.Tiny, folder: Path) -> Any:
    """The written folder in stock PEFT; a warning (missing keys) is a failure."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return PeftModel.from_pretrained(model.model(), str(folder)).eval()


COEFFICIENTS = [0.7, -1.3]


@pytest.mark.parametrize("pair", [("plain", "same"), ("plain", "wide"), ("wide", "head")])
def test_a_sum_that_was_written_is_pefts_cat_of_plain_adapters(
    tiny_llama: tiny.Tiny, tmp_path: Path, pair: tuple[str, str]
) -> None:
    mixture = weighted_sum([deltas(tiny_llama, k) for k in pair], COEFFICIENTS)
    ours = from_stock_peft(tiny_llama, written(tiny_llama, tmp_path / "mix", mixture))
    theirs = tiny_llama.peft(*pair)
    if pair == ("plain", "same"):
        theirs.add_weighted_adapter(list(pair), COEFFICIENTS, "cat", combination_type="cat")
        theirs.set_adapter("cat")
        expected = logits(theirs)
    else:  # other targets, which cat does not take: PEFT's own deltas, merged in float32
        bare = tiny_llama.model()
        named = dict(bare.named_modules())
        for kind, c in zip(pair, COEFFICIENTS, strict=True):
            for name, delta in pefts_own(tiny_llama, kind).items():
                named[name].weight.data += c * delta.float()
        expected = logits(bare)
    base = logits(tiny_llama.model())
    # Two orders of summation in float32; what the adapters change is ten thousand times larger.
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4 * float(base.std()))
    assert float((expected - base).abs().max()) > 0.5 * float(base.std())


def test_a_truncated_sum_is_pefts_svd_of_plain_adapters(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    pair = ("plain", "same")
    theirs = tiny_llama.peft(*pair)
    theirs.add_weighted_adapter(
        list(pair), COEFFICIENTS, "svd", combination_type="svd", svd_rank=3
    )  # fmt: skip
    layers = tiny.tuned_layers(theirs, "svd")
    mixture = weighted_sum([deltas(tiny_llama, k) for k in pair], COEFFICIENTS)
    assert layers.keys() == mixture.keys()
    for name, delta in mixture.items():
        cut = truncate(delta, rank=3).delta
        theirs_dense = layers[name].get_delta_weight("svd").double()
        scale = float(theirs_dense.abs().max())
        torch.testing.assert_close(cut.dense().double(), theirs_dense, rtol=1e-4, atol=1e-5 * scale)


def test_every_module_may_have_its_own_rank(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    whole = deltas(tiny_llama, "wide")
    mixed = {
        name: truncate(delta, rank=1 + n % 5).delta
        for n, (name, delta) in enumerate(sorted(whole.items()))
    }
    folder = written(tiny_llama, tmp_path / "mix", mixed)
    found = read_facts(folder)
    assert {m.name: m.rank for m in found.modules} == {n: d.rank for n, d in mixed.items()}
    assert {m.scaling for m in found.modules} == {1.0}
    layers = tiny.tuned_layers(from_stock_peft(tiny_llama, folder), "default")
    for name, delta in mixed.items():
        assert layers[name].r["default"] == delta.rank
        torch.testing.assert_close(
            layers[name].get_delta_weight("default"), delta.dense(), rtol=1e-5, atol=1e-6
        )


def test_what_is_written_is_read_back_bit_for_bit(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    mixture = weighted_sum([deltas(tiny_llama, k) for k in ("patterns", "rslora")], [0.5, 2.0])
    folder = written(tiny_llama, tmp_path / "mix", mixture)
    back = load_deltas(folder, read_facts(folder))
    assert back.keys() == mixture.keys()
    for name in mixture:
        assert torch.equal(back[name].a, mixture[name].a)
        assert torch.equal(back[name].b, mixture[name].b)
    again = written(tiny_llama, tmp_path / "again", back)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_conv1d_and_seq2seq_mixtures_load_in_stock_peft(
    tiny_gpt2: tiny.Tiny, tiny_t5: tiny.Tiny, tmp_path: Path
) -> None:
    for model, kind, conv in ((tiny_gpt2, "gpt2", True), (tiny_t5, "t5", False)):
        mixture = weighted_sum([deltas(model, kind)], [0.5])
        folder = written(model, tmp_path / kind, mixture, fan_in_fan_out=conv)
        layers = tiny.tuned_layers(from_stock_peft(model, folder), "default")
        assert layers.keys() == mixture.keys()
        for name, delta in mixture.items():
            dense = delta.dense().T if conv else delta.dense()
            torch.testing.assert_close(
                layers[name].get_delta_weight("default"), dense, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for(tiny_llama: tiny.Tiny, tmp_path: Path, dtype: str) -> None:
    folder = written(tiny_llama, tmp_path / "mix", deltas(tiny_llama, "plain"), dtype=dtype)
    kinds = {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()}
    assert kinds == {getattr(torch, dtype)}


def test_the_config_says_base_and_revision_and_no_path(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    tmp_path.joinpath("mix").mkdir()
    save_adapter(
        tmp_path / "mix", deltas(tiny_llama, "plain"), base="org/base", base_revision="b" * 40,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    text = (tmp_path / "mix" / "adapter_config.json").read_text()
    raw = json.loads(text)
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("org/base", "b" * 40)
    assert str(tmp_path) not in text
    assert (raw["r"], raw["lora_alpha"]) == (4, 4)


ALL = [f"model.layers.{n}.{m}" for n in (0, 1) for m in ("attn.q", "attn.v", "cross.q", "mlp.up")]


@pytest.mark.parametrize(
    ("adapted", "targets"),
    [
        ([m for m in ALL if m.endswith(".v")], ["v"]),
        ([m for m in ALL if m.endswith(".q")], ["q"]),
        (ALL, ["q", "up", "v"]),
        # Not every q: the short name would catch the others, too.
        ([m for m in ALL if m.endswith("attn.q")],
         ["model.layers.0.attn.q", "model.layers.1.attn.q"]),
        (["model.layers.1.mlp.up"], ["model.layers.1.mlp.up"]),
    ],
)  # fmt: skip
def test_targets_are_short_where_that_means_the_same(
    adapted: list[str], targets: list[str]
) -> None:
    assert short_targets(adapted, ALL) == targets
    assert short_targets(adapted, []) == sorted(adapted)


def test_a_short_target_catches_just_the_adapted_modules_by_pefts_own_rule() -> None:
    for adapted in (ALL[:3], ALL[::2], [m for m in ALL if "0" in m], ALL):
        targets = short_targets(adapted, ALL)
        caught = [m for m in ALL if any(m == t or m.endswith(f".{t}") for t in targets)]
        assert caught == [m for m in ALL if m in adapted]
