"""Merged models against PEFT's own merging, dense sums and the unmerged model's logits."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.api.extract import extract
from lorahub_registry.api.merge import merge
from lorahub_registry.errors import (
    BaseModelError,
    BrokenAdapter,
    IncompatibleAdapters,
    NotApplied,
    OutputError,
    RecipeError,
    UsageError,
)
from lorahub_registry.weights import merged as work
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.stream.pairs import open_models
from tests import tiny
from tests.weights.device import bounded, large, on_cuda

LLAMA = {"r": 4, "lora_alpha": 8}
GPT2 = {**LLAMA, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
EMBEDDED = {**LLAMA, "target_modules": ["q_proj", "embed_tokens"]}
# name → base, options of PEFT's LoraConfig
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    **{k: ("llama", dict(tiny.KINDS[k][1])) for k in (
        "plain", "wide", "head", "rslora", "patterns", "rslora-patterns", "embedding",
        "modules_to_save", "dora",
    )},
    "dora-everything": (
        "llama", {**LLAMA, "target_modules": [*tiny.LINEAR, "embed_tokens"], "use_dora": True}
    ),
    "saved-norms": ("llama", {**LLAMA, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "conv1d": ("gpt2", GPT2),
    "conv1d-dora": ("gpt2", {**GPT2, "use_dora": True}),
    "biases": ("gpt2", {**GPT2, "bias": "all"}),
    "own-biases": ("gpt2", {**GPT2, "bias": "lora_only"}),
    "lora-bias": ("gpt2", {**GPT2, "lora_bias": True, "use_rslora": True}),
    "tied-embedding": ("gpt2", {**LLAMA, "target_modules": ["wte", "c_fc"]}),
    "tied-embedding-dora": ("gpt2", {**LLAMA, "target_modules": ["wte"], "use_dora": True}),
    "tied-head": ("gpt2", {**LLAMA, "target_modules": ["lm_head"]}),
    "tied-both": ("gpt2", {**LLAMA, "target_modules": ["lm_head", "wte"]}),
    "tied-saved-head": ("gpt2", {**GPT2, "modules_to_save": ["lm_head"]}),
    "tied-saved-embedding": ("gpt2", {**GPT2, "modules_to_save": ["wte"]}),
    "tied-saved-together": (
        "gpt2", {**GPT2, "modules_to_save": ["wte", "lm_head"], "ensure_weight_tying": True}
    ),
    "t5": ("t5", {**LLAMA, "target_modules": ["q", "v", "wo"]}),
    "t5-dora": ("t5", {**LLAMA, "target_modules": ["q", "wi"], "use_dora": True}),
}  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def bases(
    tiny_llama: tiny.Tiny, tiny_gpt2: tiny.Tiny, tiny_t5: tiny.Tiny
) -> Mapping[str, tiny.Tiny]:
    return {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5}


@pytest.fixture(scope="session")
def made(bases: Mapping[str, tiny.Tiny], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A PEFT adapter of a kind in ``MADE``, or of a tiny base with options; seeded by its name."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def make(name: str, base: str = "", /, **options: Any) -> Path:
        if name in known:
            return known[name]
        import peft

        base, options = (base, options) if base else MADE[name]
        task = "SEQ_2_SEQ_LM" if base == "t5" else "CAUSAL_LM"
        torch.manual_seed(sum(name.encode()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(
                bases[base].model(), peft.LoraConfig(task_type=task, **options)
            )
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if any(w in key for w in ("lora_", "modules_to_save")) or (
                        options.get("bias", "none") != "none" and key.endswith("bias")
                    ):
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(root / name)
        known[name] = root / name
        return known[name]

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(raw(one[n]), raw(other[n])) for n in one
    )


def load(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    kind = (
        transformers.AutoModelForSeq2SeqLM
        if config.get("is_encoder_decoder")
        else transformers.AutoModelForCausalLM
    )
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(259, (3, 17), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def wrapped(base: tiny.Tiny, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base.model(), str(adapter)).eval()


class Talk:
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def task(self, title: str, total: float | None = None, unit: str = "") -> Any:
        from lorahub_registry.progress import silent

        return silent.task(title, total, unit)

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


@pytest.mark.parametrize("name", MADE)
def test_equals_what_peft_merges_and_answers_as_peft_unmerged(
    name: str, bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base, adapter = bases[MADE[name][0]], made(name)
    out = tmp_path / "merged"
    report = merge(base.folder, {str(adapter): 1.0}, out, check=True)
    assert report["check"]["largest_difference"] < 1e-5 < report["check"]["effect"]
    one = wrapped(base, adapter)
    expected = logits(one)
    model = load(out)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(expected, logits(base.model()), atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = one.merge_and_unload()
    # PEFT writes a tied weight in its place: its two ends are compared by the logits alone.
    if not report["untied"]:
        state = whole.state_dict()
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, state[key], rtol=1e-5, atol=1e-6, msg=key)
    # What no adapter touches is the base's, bit by bit.
    before, after = tensors(base.folder), tensors(out)
    touched = set(report["modules"])
    assert set(after) == set(before) | set(report["untied"])
    for key in before.keys() - touched:
        assert torch.equal(raw(before[key]), raw(after[key])), key
    assert touched


@pytest.mark.parametrize(
    "name", [n for n in MADE if n.startswith("tied-") and not n.endswith("together")]
)
def test_a_tied_end_that_changes_alone_is_written_apart(
    name: str, bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    talk, out = Talk(), tmp_path / "merged"
    report = merge(bases["gpt2"].folder, {str(made(name)): 1.0}, out, progress=talk)
    assert report["untied"] == ["lm_head.weight"]
    assert any("lm_head.weight is written apart" in line for line in talk.warned)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    after = tensors(out)
    assert not torch.equal(after["lm_head.weight"], after["transformer.wte.weight"])


def test_a_head_apart_has_a_difference_from_the_tied_one(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base, out = bases["gpt2"], tmp_path / "merged"
    merge(base.folder, {str(made("tied-head")): 1.0}, out)
    before, after = tensors(base.folder), tensors(out)
    head, table = "lm_head.weight", "transformer.wte.weight"
    for one, other, sign in ((base.folder, out, 1), (out, base.folder, -1)):
        with open_models(one, other) as models:
            pairs = {pair.name: pair for pair in models.pairs}
            assert set(pairs) == set(after)
            assert models.unknown == ()
            delta = models.difference(pairs[head])
            assert not models.difference(pairs[table]).any()
        assert torch.equal(delta, sign * (after[head] - before[table]))
        assert delta.any()
    # And the head's own difference brings the tied base to the merged model.
    found = extract(base.folder, out, tmp_path / "lora", rank=4, include=["lm_head"])
    assert found.report["error"] < 1e-5
    expected = logits(load(out))
    torch.testing.assert_close(logits(wrapped(base, found.path)), expected, rtol=1e-4, atol=2e-5)


def test_what_is_written_apart_is_counted_in_the_index(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base = half(bases["gpt2"], tmp_path, torch.float32, shards=3)
    index = "model.safetensors.index.json"
    for name in ("conv1d", "tied-head"):
        out = tmp_path / name
        merge(base, {str(made(name)): 1.0}, out)
        before, after = (json.loads((p / index).read_text())["metadata"] for p in (base, out))
        assert before["total_parameters"] > 0
        assert after["total_parameters"] == load(out).num_parameters()


@pytest.mark.parametrize("kind", ["dora", "conv1d-dora"])
def test_magnitudes_over_nothing_are_refused(
    kind: str, bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases[MADE[kind][0]].folder, base)
    adapter = changed(made(kind), tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    for key in state:
        if "lora_B" in key:
            state[key][3] = 0
    save_file(state, path)
    held = load_file(base / "model.safetensors")
    name, what = "transformer.h.1.attn.c_attn", "column"
    if kind == "dora":
        name, what = "model.layers.1.self_attn.q_proj", "row"
        held[f"{name}.weight"][3] = 0
    else:
        held[f"{name}.weight"][:, 3] = 0
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleAdapters, match=rf"{name}: {what} 3 of W \+ ΔW is all zero"):
        merge(base, {str(adapter): 1.0}, tmp_path / "m")


def test_a_run_of_other_versions_is_begun_anew(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(source: Path, target: Path) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorahub_registry.weights.papers.copy_papers", stopped)

    def said() -> str:
        talk = Talk()
        with pytest.raises(KeyboardInterrupt):
            merge(bases["llama"].folder, {str(made("plain")): 1.0}, tmp_path / "m", progress=talk)
        return talk.said[0]

    assert "are kept" in said()
    assert "an earlier run was stopped" in said()
    monkeypatch.setattr("lorahub_registry.api.output.version", lambda name: "0.0")
    assert "are kept" in said()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["wide", "dora", "conv1d-dora", "modules_to_save", "lora-bias"])
def test_the_cpu_is_the_default_and_is_told(
    name: str, dtype: torch.dtype, bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base, terms = half(bases[MADE[name][0]], tmp_path, dtype), {str(made(name)): 1.0}
    reports = [merge(base, terms, tmp_path / "a"), merge(base, terms, tmp_path / "b", device="cpu")]
    assert reports[0] == reports[1]
    assert reports[0]["device"] == "cpu"
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def test_a_device_that_is_not_there_is_refused(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "tpu"):
        with pytest.raises(BaseModelError, match=f"device '{device}' is not on this machine"):
            merge(bases["llama"].folder, {str(made("wide")): 1.0}, tmp_path / "m", device=device)
    assert not (tmp_path / "m").exists()


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MADE)
def test_cuda_makes_what_the_cpu_makes(
    name: str, dtype: torch.dtype, bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base, terms = half(bases[MADE[name][0]], tmp_path, dtype), {str(made(name)): 1.0}
    before = merge(base, terms, tmp_path / "cpu")
    after = merge(base, terms, tmp_path / "cuda", device="cuda")
    assert (before["device"], after["device"]) == ("cpu", "cuda")
    # Sums in another order; what lies between two steps of the type may go either way.
    near = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]
    one, other, stored = (tensors(p) for p in (tmp_path / "cpu", tmp_path / "cuda", base))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        if key in after["modules"]:
            torch.testing.assert_close(other[key], tensor, rtol=near, atol=near / 10, msg=key)
        else:
            assert torch.equal(raw(other[key]), raw(stored[key])), key
    for key, facts in after["modules"].items():
        assert facts["delta_norm"] == pytest.approx(before["modules"][key]["delta_norm"], rel=1e-4)
    assert after["rounding_error"] == pytest.approx(before["rounding_error"], rel=0.05, abs=1e-5)


@on_cuda
def test_a_run_of_another_device_is_begun_anew(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(source: Path, target: Path) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorahub_registry.weights.papers.copy_papers", stopped)

    def said(device: str) -> str:
        talk, terms = Talk(), {str(made("plain")): 1.0}
        with pytest.raises(KeyboardInterrupt):
            merge(bases["llama"].folder, terms, tmp_path / "m", device=device, progress=talk)
        return talk.said[0]

    assert "are kept" in said("cpu")
    assert "are kept" in said("cuda")
    assert "an earlier run was stopped" in said("cuda")


@on_cuda
def test_what_a_device_holds_of_a_model_is_bounded(tmp_path: Path) -> None:
    base, adapter = tmp_path / "large", tmp_path / "lora"
    largest = large(base)
    factors(adapter, base)
    with bounded(largest):
        merge(base, {str(adapter): 0.5}, tmp_path / "cuda", device="cuda")
    merge(base, {str(adapter): 0.5}, tmp_path / "cpu")
    one, other = tensors(tmp_path / "cpu"), tensors(tmp_path / "cuda")
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=2**-7, atol=1e-5, msg=key)


def factors(folder: Path, base: Path) -> None:
    """An adapter of rank 16 on all linear modules of a base, which is not loaded."""
    import peft

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(base)
        )
        config = peft.LoraConfig(r=16, target_modules=list(tiny.LINEAR))
        wide = peft.get_peft_model(model, config)
    drawn = torch.Generator().manual_seed(0)
    state = {
        n.replace(".default", ""): torch.randn(p.shape, generator=drawn) * 0.02
        for n, p in wide.named_parameters()
        if "lora_" in n
    }
    folder.mkdir()
    wide.peft_config["default"].base_model_name_or_path = base.name
    wide.peft_config["default"].save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors")


def test_ends_that_change_alike_stay_one(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    """PEFT saves the base's embedding where tokens were added, and loads it into both ends."""
    base, adapter = bases["gpt2"], changed(made("conv1d"), tmp_path / "more")
    path = adapter / "adapter_model.safetensors"
    key = "transformer.wte.weight"
    saved = {f"base_model.model.{key}": tensors(base.folder)[key] * 0.9}
    save_file(load_file(path) | saved, path)
    report = merge(base.folder, {str(adapter): 1.0}, tmp_path / "m", check=True)
    assert report["untied"] == []
    assert "lm_head.weight" not in tensors(tmp_path / "m")
    expected = logits(wrapped(base, adapter))
    torch.testing.assert_close(logits(load(tmp_path / "m")), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kept", ["wte.weight", "lm_head.weight"])
def test_other_names_of_a_checkpoint_are_kept(
    kept: str, bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    """As the Hub's gpt2 has them, without the head's prefix; or the tied weight as the head."""
    base = tmp_path / "tiny-gpt2"
    shutil.copytree(bases["gpt2"].folder, base)
    old = {
        kept if "wte" in n else n.removeprefix("transformer."): t for n, t in tensors(base).items()
    }
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    for name in ("conv1d", "tied-head", "tied-embedding"):
        out = tmp_path / name
        report = merge(base, {str(made(name)): 1.0}, out)
        assert set(tensors(out)) == set(old) | set(report["untied"])
        expected = logits(wrapped(bases["gpt2"], made(name)))
        torch.testing.assert_close(logits(load(out)), expected, rtol=1e-4, atol=2e-5)


def test_what_an_architecture_cannot_have_apart_is_refused(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    adapter = made("t5-head", "t5", **LLAMA, target_modules=["lm_head"])
    with pytest.raises(IncompatibleAdapters, match="cannot have them apart"):
        merge(bases["t5"].folder, {str(adapter): 1.0}, tmp_path / "m")
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "m").exists()


def half(base: tiny.Tiny, folder: Path, dtype: torch.dtype, *, shards: int = 1) -> Path:
    """The base in another type, in so many shards."""
    model = base.model().to(dtype)
    place = folder / base.name
    size = sum(t.numel() * t.itemsize for t in model.state_dict().values())
    model.save_pretrained(place, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    base.tokenizer().save_pretrained(place)
    assert (len(list(place.glob("*.safetensors"))) > 1) == (shards > 1)
    return place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_sum_is_rounded_once_to_the_type_that_is_stored(
    dtype: torch.dtype, bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base, adapter = half(bases["llama"], tmp_path, dtype), made("wide")
    talk = Talk()
    report = merge(base, {str(adapter): 0.01}, tmp_path / "m", progress=talk)
    before, after = tensors(base), tensors(tmp_path / "m")
    for name, delta in load_deltas(adapter, read_facts(adapter)).items():
        key = f"{name}.weight"
        wide = torch.promote_types(dtype, torch.float32)
        dense = delta.scaled(0.01).to("cpu", wide).dense()
        assert torch.equal(raw(after[key]), raw((before[key].to(wide) + dense).to(dtype))), key
        lost = (after[key].double() - before[key].double() - dense.double()).norm() / dense.norm()
        found = report["modules"][key]
        assert found["delta_norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
        assert found["rounding_error"] == pytest.approx(float(lost), rel=1e-3, abs=1e-5)
    assert all(t.dtype == dtype for t in after.values())
    warned = [line for line in talk.warned if "of the delta" in line]
    assert len(warned) == (dtype is not torch.float64)
    for line in warned:
        assert line.startswith(
            f"{report['dtype']} keeps {1 - report['rounding_error']:.0%} of the delta"
        )


def test_a_half_precision_base_passes_the_check(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base = half(bases["llama"], tmp_path, torch.bfloat16)
    for name in ("wide", "dora", "embedding"):
        found = merge(base, {str(made(name)): 1.0}, tmp_path / name, check=True)["check"]
        assert found["explained"] == pytest.approx(found["largest_difference"], rel=0.2)
        assert found["explained"] < found["effect"]
    gpt2 = half(bases["gpt2"], tmp_path, torch.bfloat16)
    for name in ("tied-embedding", "tied-saved-head", "lora-bias"):
        merge(gpt2, {str(made(name)): 1.0}, tmp_path / name, check=True)


def test_a_delta_below_the_steps_of_the_type_is_an_error(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base = half(bases["llama"], tmp_path, torch.bfloat16)
    with pytest.raises(NotApplied, match="bfloat16 holds nothing of the delta"):
        merge(base, {str(made("plain")): 1e-9}, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / ".m.unfinished").exists()


def test_numbers_that_the_type_cannot_hold_are_an_error(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base = half(bases["llama"], tmp_path, torch.float16)
    with pytest.raises(BaseModelError, match="beyond what float16 holds"):
        merge(base, {str(made("plain")): 1e7}, tmp_path / "m")
    state = load_file(base / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"][3, 3] = torch.nan
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"q_proj.weight holds NaN or infinity"):
        merge(base, {str(made("plain")): 1.0}, tmp_path / "m")


coefficient = st.floats(-3, 3).filter(lambda c: abs(c) > 1e-3)


@settings(max_examples=25)
@given(
    st.lists(
        st.sampled_from(["plain", "wide", "rslora", "patterns", "embedding"]),
        min_size=2, max_size=4, unique=True,
    ),
    st.lists(coefficient, min_size=4, max_size=4),
)  # fmt: skip
def test_a_weighted_sum_equals_the_dense_one(
    bases: Mapping[str, tiny.Tiny],
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    coefficients: list[float],
) -> None:
    base, out = bases["llama"], tmp_path_factory.mktemp("sum") / "m"
    terms = {str(base.adapter(n)): c for n, c in zip(names, coefficients, strict=False)}
    merge(base.folder, terms, out)
    expected = {n: t.double() for n, t in tensors(base.folder).items()}
    for adapter, c in terms.items():
        for name, delta in load_deltas(Path(adapter), read_facts(Path(adapter))).items():
            dense = delta.to("cpu", torch.float64).dense()
            dense = dense.T if delta.kind == "embedding" else dense
            expected[f"{name}.weight"] += c * dense
    for key, tensor in tensors(out).items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-5, atol=2e-6, msg=key)


def test_several_in_company_pass_the_check(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base = bases["llama"]
    terms = {str(base.adapter("embedding")): 0.5, str(base.adapter("wide")): -1.5}
    report = merge(base.folder, terms, tmp_path / "m", check=True)
    assert [a["coefficient"] for a in report["adapters"]] == [0.5, -1.5]
    tied = {str(made("tied-embedding")): 0.3, str(made("conv1d")): 0.7}
    merge(bases["gpt2"].folder, tied, tmp_path / "g", check=True)


def test_shards_blocks_and_workers_change_nothing(
    bases: Mapping[str, tiny.Tiny],
    made: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind, name in (("llama", "dora-everything"), ("gpt2", "conv1d-dora"), ("gpt2", "biases")):
        base, adapter = bases[kind], made(name)
        monkeypatch.setattr(work, "TILE", 256)  # many tiles, so that blocks can differ
        one = tmp_path / name / "one"
        merge(base.folder, {str(adapter): 1.0}, one)
        sharded = half(base, tmp_path / name, torch.float32, shards=3)
        many = tmp_path / name / "many"
        merge(sharded, {str(adapter): 1.0}, many)
        assert same(tensors(one), tensors(many))
        assert {p.name for p in many.iterdir()} == {p.name for p in sharded.iterdir()} | {
            "lorareg.json"
        }
        index = "model.safetensors.index.json"
        before, after = (json.loads((p / index).read_text()) for p in (sharded, many))
        assert before["weight_map"] == after["weight_map"]
        for file in sharded.glob("*.safetensors"):
            with safe_open(file, "pt") as a, safe_open(many / file.name, "pt") as b:
                assert list(a.keys()) == list(b.keys())
                assert a.metadata() == b.metadata()
        for number, (block, workers) in enumerate([(256, 1), (1024, 5), (1 << 20, 2)]):
            monkeypatch.setattr(work, "BLOCK", block)
            monkeypatch.setattr("lorahub_registry.weights.stream.work.cores", lambda n=workers: n)
            other = tmp_path / name / f"other{number}"
            merge(base.folder, {str(adapter): 1.0}, other)
            assert same(tensors(one), tensors(other))
            reports = [json.loads((p / "lorareg.json").read_text()) for p in (one, other)]
            assert reports[0]["modules"] == reports[1]["modules"]


REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "its training started by changing the base"),
    "tokens": ({"trainable_token_indices": [1]}, "single tokens"),
    "parameters": ({"target_parameters": ["x"]}, "bare parameters"),
    "new": ({"use_something": True}, "use_something, which lorareg does not know"),
}


def changed(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(
    kind: str, bases: Mapping[str, tiny.Tiny], tmp_path: Path
) -> None:
    base = bases["llama"]
    config, says = REFUSED[kind]
    adapter = changed(base.adapter("plain"), tmp_path / "odd", **config)
    with pytest.raises(IncompatibleAdapters, match=f"odd: .*{says}"):
        merge(base.folder, {str(adapter): 1.0}, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_kinds_and_pickles_are_refused(
    bases: Mapping[str, tiny.Tiny], tmp_path: Path
) -> None:
    base = bases["llama"]
    for kind in ("ia3", "adalora"):
        with pytest.raises(IncompatibleAdapters, match="only LoRA adapters"):
            merge(base.folder, {str(base.adapter(kind)): 1.0}, tmp_path / "m")
    pickled = changed(base.adapter("plain"), tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(IncompatibleAdapters, match="a pickle"):
        merge(base.folder, {str(pickled): 1.0}, tmp_path / "m")
    conv = changed(base.adapter("plain"), tmp_path / "conv")
    path = conv / "adapter_model.safetensors"
    state = {n: t[..., None, None].contiguous() for n, t in load_file(path).items()}
    save_file(state, path)
    with pytest.raises(IncompatibleAdapters, match="conv LoRA"):
        merge(base.folder, {str(conv): 1.0}, tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dora", "DoRA scales the whole weight"),
        ("biases", "biases"),
        ("lora-bias", "bias of its own"),
        ("modules_to_save", "whole modules"),
    ],
)
def test_what_is_no_sum_is_merged_alone_and_whole_only(
    name: str, says: str, bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base = bases[MADE[name][0]]
    company = made("conv1d" if MADE[name][0] == "gpt2" else "plain")
    for terms in ({made(name): 0.5}, {made(name): 1.0, company: 1.0}):
        with pytest.raises(IncompatibleAdapters, match=says) as caught:
            merge(base.folder, {str(p): c for p, c in terms.items()}, tmp_path / "m")
        assert "alone and with coefficient 1" in str(caught.value.hint)


def test_parts_that_are_missing_are_told(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    def without(name: str, part: str) -> Path:
        folder = tmp_path / f"no-{part}"
        shutil.copytree(made(name), folder)
        path = folder / "adapter_model.safetensors"
        save_file({n: t for n, t in load_file(path).items() if part not in n}, path)
        return folder

    with pytest.raises(BrokenAdapter, match="has no lora_magnitude_vector"):
        merge(
            bases["llama"].folder, {str(without("dora", "0.self_attn.q_proj.lora_magnitude")): 1.0},
            tmp_path / "m",
        )  # fmt: skip
    with pytest.raises(BrokenAdapter, match="holds nothing of lm_head"):
        merge(
            bases["llama"].folder, {str(without("modules_to_save", "lm_head")): 1.0}, tmp_path / "m"
        )
    plain = changed(made("dora"), tmp_path / "plain", use_dora=False)
    with pytest.raises(BrokenAdapter, match="no DoRA module"):
        merge(bases["llama"].folder, {str(plain): 1.0}, tmp_path / "m")


def test_a_bias_that_the_base_has_not_is_refused(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    adapter = changed(made("plain"), tmp_path / "biased", lora_bias=True)
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    key = next(n for n in state if n.endswith("q_proj.lora_B.weight"))
    save_file(state | {key.replace("weight", "bias"): torch.ones(32)}, path)
    with pytest.raises(IncompatibleAdapters, match=r"q_proj.lora_B.bias, for which .* no place"):
        merge(bases["llama"].folder, {str(adapter): 1.0}, tmp_path / "m")


def test_a_bias_that_was_promised_is_warned_of(
    bases: Mapping[str, tiny.Tiny], tmp_path: Path
) -> None:
    talk, base = Talk(), bases["llama"]
    report = merge(base.folder, {str(base.adapter("bias")): 1.0}, tmp_path / "m", progress=talk)
    assert any("it holds no bias" in line for line in talk.warned)
    assert any("it holds no bias" in line for line in report["notes"])


def test_what_does_nothing_is_an_error(bases: Mapping[str, tiny.Tiny], tmp_path: Path) -> None:
    base = bases["llama"]
    zero = changed(base.adapter("plain"), tmp_path / "zero")
    path = zero / "adapter_model.safetensors"
    save_file({n: t * ("lora_A" in n) for n, t in load_file(path).items()}, path)
    plain = str(base.adapter("plain"))
    for terms in ({str(zero): 1.0}, {str(zero): 1.0, plain: 1.0}):
        with pytest.raises(NotApplied, match="zero: every delta of it is 0"):
            merge(base.folder, terms, tmp_path / "m")
    for terms in ({plain: 0.0}, {plain: float("nan")}, {}):
        with pytest.raises(UsageError):
            merge(base.folder, terms, tmp_path / "m")
    with pytest.raises(RecipeError, match="twice"):
        merge(base.folder, [(plain, 1.0), (plain + "/", 2.0)], tmp_path / "m")
    state = load_file(path)
    state[next(iter(state))][0, 0] = torch.inf
    save_file(state, path)
    with pytest.raises(BrokenAdapter, match="holds NaN or infinity"):
        merge(base.folder, {str(zero): 1.0}, tmp_path / "m")


def test_coefficient_zero_in_company_leaves_no_trace(
    bases: Mapping[str, tiny.Tiny], tmp_path: Path
) -> None:
    base = bases["llama"]
    plain, wide = str(base.adapter("plain")), str(base.adapter("wide"))
    merge(base.folder, {plain: 1.0}, tmp_path / "one")
    merge(base.folder, {plain: 1.0, wide: 0.0}, tmp_path / "two")
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "two"))


def test_another_base_is_refused_by_shapes_and_warned_of_by_name(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    with pytest.raises(IncompatibleAdapters, match=r"does not fit tiny-gpt2: the base has no"):
        merge(bases["gpt2"].folder, {str(made("plain")): 1.0}, tmp_path / "m")
    wider = tmp_path / "tiny-llama"
    config = transformers.AutoConfig.from_pretrained(bases["llama"].folder)
    config.num_key_value_heads = 4
    transformers.LlamaForCausalLM(config).save_pretrained(wider)
    with pytest.raises(
        IncompatibleAdapters, match=r"v_proj.weight is 16x32 in the adapter and 32x32 in the base"
    ):
        merge(wider, {str(made("plain")): 1.0}, tmp_path / "m")
    square = made("square", "llama", r=2, target_modules=["q_proj"])
    assert merge(wider, {str(square): 1.0}, tmp_path / "m")["notes"] == []
    talk, elsewhere = Talk(), tmp_path / "mistral-7b"
    shutil.copytree(bases["llama"].folder, elsewhere)
    report = merge(elsewhere, {str(square): 1.0}, tmp_path / "n", progress=talk)
    assert any("square was made for tiny-llama, not for" in line for line in talk.warned)
    assert len(report["notes"]) == 1


def test_a_matrix_that_lies_the_other_way_does_not_fit(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    """The shapes as a set are the same; the factors of one are the other's."""
    adapter = changed(made("plain"), tmp_path / "turned", target_modules=["v_proj"])
    path = adapter / "adapter_model.safetensors"
    old = {n: t for n, t in load_file(path).items() if "v_proj" in n}
    flip = {"A": "B", "B": "A"}
    new = {n.replace(f"lora_{s}", f"lora_{flip[s]}"): t.T.contiguous() for n, t in old.items()
           for s in "AB" if f"lora_{s}" in n}  # fmt: skip
    save_file(new, path)
    with pytest.raises(IncompatibleAdapters, match=r"v_proj.weight is 32x16 .* and 16x32"):
        merge(bases["llama"].folder, {str(adapter): 1.0}, tmp_path / "m")


@pytest.fixture
def base(bases: Mapping[str, tiny.Tiny], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases["llama"].folder, tmp_path / "tiny-llama"))


def test_quantised_bases_are_refused(base: Path, made: Make, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    state = load_file(base / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"] = torch.ones(32, 32, dtype=torch.int8)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"quantised: .*q_proj.weight is I8") as caught:
        merge(base, {str(made("plain")): 1.0}, tmp_path / "m")
    assert "before it was quantised" in str(caught.value.hint)
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=r"quantised \(gptq\)"):
        merge(base, {str(made("plain")): 1.0}, tmp_path / "m")


def test_places(base: Path, made: Make, tmp_path: Path) -> None:
    terms, out = {str(made("plain")): 1.0}, tmp_path / "m"
    merge(base, terms, out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        merge(base, terms, out)
    merge(base, {str(made("wide")): 1.0}, out, force=True)
    assert len(json.loads((out / "lorareg.json").read_text())["modules"]) == 14
    (out / "mine").write_text("x")
    with pytest.raises(OutputError, match="holds mine"):
        merge(base, terms, out, force=True)
    # A merged model is a base again; not in its own place.
    (out / "mine").unlink()
    with pytest.raises(OutputError, match="holds what this is made of"):
        merge(out, terms, out, force=True)
    merge(out, terms, tmp_path / "again")
    shutil.rmtree(tmp_path / "again")
    text = (out / "lorareg.json").read_text()
    assert str(tmp_path) not in text


def test_a_missing_shard_is_named(
    bases: Mapping[str, tiny.Tiny], made: Make, tmp_path: Path
) -> None:
    base = half(bases["llama"], tmp_path, torch.float32, shards=3)
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(BaseModelError, match=shard.name):
        merge(base, {str(made("plain")): 1.0}, tmp_path / "m")


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "zeroed": lambda s: s["model.layers.1.mlp.up_proj.weight"].zero_(),
    "one number": lambda s: s["model.layers.1.self_attn.v_proj.weight"][3, 3].add_(1),
    "another tensor": lambda s: s["model.norm.weight"].mul_(1.01),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_sees_a_damaged_file(
    damage: str,
    dtype: torch.dtype,
    bases: Mapping[str, tiny.Tiny],
    made: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, terms = half(bases["llama"], tmp_path, dtype), {str(made("wide")): 1.0}
    papers = "lorahub_registry.weights.papers.copy_papers"
    from lorahub_registry.weights.papers import copy_papers

    def damaging(source: Path, target: Path) -> list[str]:
        state = load_file(target / "model.safetensors")
        DAMAGES[damage](state)
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        return copy_papers(source, target)

    monkeypatch.setattr(papers, damaging)
    with pytest.raises(NotApplied, match="where rounding explains"):
        merge(base, terms, tmp_path / "m", check=True)
    assert not (tmp_path / "m").exists()

    def undone(source: Path, target: Path) -> list[str]:
        shutil.copy(source / "model.safetensors", target)
        return copy_papers(source, target)

    monkeypatch.setattr(papers, undone)
    with pytest.raises(NotApplied, match="answers as tiny-llama alone does"):
        merge(base, terms, tmp_path / "m", check=True)
