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
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters
from lorahub_registry.weights.files import (
    exact_pattern,
    load_deltas,
    load_factors,
    save_adapter,
    short_targets,
)
from lorahub_registry.weights.lowrank import LowRank, weighted_sum
from lorahub_registry.weights.truncate import truncate
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
    modules = [name for name, _ in model.model().named_modules()]
    save_adapter(
        folder, mixture, base=model.name, base_revision=None, task_type="CAUSAL_LM",
        all_modules=modules, **more,
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


# Names that end in one another: PEFT takes a target, and a key of a pattern, for all of them.
NESTED = ["lm_head", "draft.lm_head", "draft.inner.lm_head", "l.1.q", "model.l.1.q", "modelXl.1.q"]


@pytest.mark.parametrize("adapted", [["lm_head"], ["draft.lm_head"], ["l.1.q"], NESTED[:2],
                                     ["lm_head", "model.l.1.q"], NESTED[2:], NESTED])  # fmt: skip
def test_targets_and_patterns_mean_just_these_modules_by_pefts_own_rule(adapted: list[str]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    config = LoraConfig(target_modules=short_targets(adapted, NESTED))
    assert [m for m in NESTED if check_target_module_exists(config, m)] == [
        m for m in NESTED if m in adapted
    ]
    ranks = {exact_pattern(name, adapted): n for n, name in enumerate(adapted)}
    found = [ranks[get_pattern_key(ranks, name)] for name in adapted]
    assert found == list(range(len(adapted)))
    # One of them alone has a rank of its own.
    for name in adapted:
        key = exact_pattern(name, adapted)
        assert [m for m in adapted if get_pattern_key([key], m) == key] == [name]


def test_names_that_end_in_one_another_keep_their_ranks_in_stock_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from torch import nn

    inner = nn.ModuleDict({"head": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "draft": inner, "more": nn.Linear(4, 4)})
    made = torch.Generator().manual_seed(1)
    ranks = {"head": 1, "draft.other": 2, "more": 2}
    mixture = {
        name: LowRank(torch.randn(rank, 4, generator=made), torch.randn(4, rank, generator=made))
        for name, rank in ranks.items()
    }
    save_adapter(
        tmp_path, mixture, base="b", base_revision=None, task_type="CAUSAL_LM",
        all_modules=[n for n, _ in model.named_modules()],
    )  # fmt: skip
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    raw["task_type"] = None  # the model is no transformers one
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    layers = tiny.tuned_layers(PeftModel.from_pretrained(model, str(tmp_path)), "default")
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    for name, layer in layers.items():
        torch.testing.assert_close(layer.get_delta_weight("default"), mixture[name].dense())
    assert read_facts(tmp_path).ranks == {1: 1, 2: 2}


def test_embedding_deltas_are_those_of_peft_transposed(tiny_llama: tiny.Tiny) -> None:
    ours, model = deltas(tiny_llama, "embedding"), tiny_llama.peft("embedding")
    layer = model.base_model.model.model.embed_tokens
    delta = ours["model.embed_tokens"]
    assert {d.kind for d in ours.values()} == {"linear", "embedding"}
    assert delta.shape == (32, layer.weight.shape[0])
    torch.testing.assert_close(
        delta.dense().T, layer.get_delta_weight("embedding"), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("rank", [None, 3])
def test_a_mixture_with_embeddings_is_what_stock_peft_loads(
    tiny_llama: tiny.Tiny, tmp_path: Path, rank: int | None
) -> None:
    parts = [deltas(tiny_llama, k) for k in ("embedding", "wide")]
    mixture = weighted_sum([*parts, parts[0]], [0.7, -1.3, 0.2])
    if rank:
        mixture = {name: truncate(delta, rank=rank).delta for name, delta in mixture.items()}
    bare = tiny_llama.model()
    named = dict(bare.named_modules())
    for name, delta in mixture.items():
        dense = delta.dense()
        named[name].weight.data += dense.T if delta.kind == "embedding" else dense
    ours = from_stock_peft(tiny_llama, written(tiny_llama, tmp_path / "mix", mixture))
    expected, base = logits(bare), logits(tiny_llama.model())
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4 * float(base.std()))
    assert float((expected - base).abs().max()) > 0.5 * float(base.std())
    back = load_deltas(tmp_path / "mix", read_facts(tmp_path / "mix"))
    assert all(torch.equal(back[n].a, mixture[n].a) for n in mixture)
    assert {n: d.kind for n, d in back.items()} == {n: d.kind for n, d in mixture.items()}


def test_conv_lora_is_no_matrix(tmp_path: Path) -> None:
    from tests.adapters.making import adapter

    tensors = {f"m.lora_{side}.weight": ("F32", [4, 4, 1, 1], bytes(64)) for side in "AB"}
    folder = adapter(tmp_path, tensors)
    with pytest.raises(IncompatibleAdapters, match="m is conv LoRA"):
        load_deltas(folder, read_facts(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_files_agree_with_float64(
    tiny_llama: tiny.Tiny, tmp_path: Path, dtype: torch.dtype
) -> None:
    parts, exact = [], []
    for kind in ("patterns", "rslora"):
        folder = tmp_path / kind
        shutil.copytree(tiny_llama.adapter(kind), folder)
        file = folder / "adapter_model.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
        facts = read_facts(folder)
        parts.append(load_deltas(folder, facts))
        factors = load_factors(folder, facts)
        exact.append({n: s * b.double() @ a.double() for n, (a, b, s) in factors.items()})
    for name, delta in weighted_sum(parts, COEFFICIENTS).items():
        terms = [c * e[name] for c, e in zip(COEFFICIENTS, exact, strict=True) if name in e]
        whole = sum(terms)
        size = sum(float(t.abs().max()) for t in terms)
        dense = delta.b.double() @ delta.a.double()
        assert float((dense - whole).abs().max()) <= 1e-6 * size
