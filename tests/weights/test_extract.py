"""A LoRA of a difference: the nearest of its rank, applied by PEFT as it was extracted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.api.extract import extract
from lorahub_registry.api.factored import Factored
from lorahub_registry.errors import BaseModelError, NotApplied, OutputError, UsageError
from lorahub_registry.registry.store import Registry
from lorahub_registry.weights import factorise
from lorahub_registry.weights import files as files_room
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.ranks import Spectrum, allocate
from lorahub_registry.weights.stream.part import unfinished
from tests.weights import two


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama, and one whose every parameter differs."""
    folder, base = tmp_path_factory.mktemp("pair"), two.model("Llama")
    return two.save(base, folder / "base"), two.save(two.tuned(base), folder / "tuned")


def differences(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    """Float64, by stored name."""
    before, after = (
        {n: t for f in sorted(p.glob("*.safetensors")) for n, t in load_file(f).items()}
        for p in (base, tuned)
    )
    return {n: after[n].double() - before[n].double() for n in before}


def deltas(made: Factored) -> dict[str, Any]:
    return load_deltas(made.path, read_facts(made.path))


def run(pair: tuple[Path, Path], out: Path, **more: Any) -> Factored:
    return extract(*pair, out / "lora", **more)


@pytest.mark.parametrize("rank", [1, 4, 24])
def test_every_module_is_the_nearest_of_its_rank(
    pair: tuple[Path, Path], tmp_path: Path, rank: int
) -> None:
    made, whole = run(pair, tmp_path, rank=rank, rest="ignore"), differences(*pair)
    found = deltas(made)
    assert len(found) == 14
    for name, delta in found.items():
        matrix = whole[f"{name}.weight"]
        assert delta.rank == min(rank, *matrix.shape)
        best = float(torch.linalg.svdvals(matrix)[rank:].norm())
        error = float((matrix - delta.dense().double()).norm())
        assert error <= 1.001 * best + 1e-6
        told = made.report["modules"][name]
        assert told["error"] == pytest.approx(error / float(matrix.norm()), rel=1e-4, abs=1e-8)
        assert told["kept"] == pytest.approx(1 - (error / float(matrix.norm())) ** 2, abs=1e-5)
    total = sum(float(whole[f"{n}.weight"].square().sum()) for n in found)
    lost = sum(
        float((whole[f"{n}.weight"] - d.dense().double()).square().sum()) for n, d in found.items()
    )
    assert made.report["kept"] == pytest.approx(1 - lost / total, abs=1e-5)


def test_a_large_matrix_too_and_exact_agrees(tmp_path: Path) -> None:
    # Above the size where all directions are computed anyway, with a spectrum that falls slowly.
    base = two.model("Llama", hidden_size=640, intermediate_size=700, num_hidden_layers=1)
    folders = two.save(base, tmp_path / "base"), two.save(two.tuned(base), tmp_path / "tuned")
    found, errors = [], []
    for exact in (False, True):
        made = extract(
            *folders, tmp_path / f"lora-{exact}", rank=16, include=["up_proj"], exact=exact,
            rest="ignore",
        )  # fmt: skip
        [(name, delta)] = deltas(made).items()
        found.append(delta.dense())
        matrix = differences(*folders)[f"{name}.weight"]
        errors.append(float((matrix - delta.dense().double()).norm()))
        best = float(torch.linalg.svdvals(matrix)[16:].norm())
        assert errors[-1] <= 1.001 * best
    assert errors[1] <= errors[0]
    assert not torch.equal(*found), "--exact is another computation"


@pytest.mark.parametrize("architecture", two.ARCHITECTURES)
def test_base_and_full_rank_with_the_rest_are_the_tuned_model(
    architecture: str, tmp_path: Path
) -> None:
    base = two.model(architecture)
    tuned = two.tuned(base)
    folders = two.save(base, tmp_path / "base"), two.save(tuned, tmp_path / "tuned")
    made = extract(*folders, tmp_path / "lora", rank="full", rest="save")
    model = PeftModel.from_pretrained(two.model(architecture), str(made.path)).eval()
    before, wanted, found = (two.logits(m) for m in (two.model(architecture), tuned, model))
    assert float((before - wanted).abs().max()) > 0.1
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    assert made.report["kept"] == 1.0


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "T5"])
def test_peft_adds_just_what_was_extracted(architecture: str, tmp_path: Path) -> None:
    base = two.model(architecture)
    folders = two.save(base, tmp_path / "base"), two.save(two.tuned(base), tmp_path / "tuned")
    made = extract(*folders, tmp_path / "lora", rank=32, rest="ignore", dtype="float32")
    merged = PeftModel.from_pretrained(two.model(architecture), str(made.path)).merge_and_unload()
    weights = dict(merged.named_parameters())
    for name, delta in deltas(made).items():
        weight, before = weights[f"{name}.weight"], base.get_parameter(f"{name}.weight")
        dense = delta.dense().T if architecture == "GPT2" else delta.dense()
        torch.testing.assert_close(weight - before, dense, rtol=0, atol=1e-6)
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 32
    assert config["fan_in_fan_out"] is (architecture == "GPT2")


def test_an_energy_takes_the_smallest_rank_that_keeps_it(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    made, whole = run(pair, tmp_path, energy=0.8, rest="ignore"), differences(*pair)
    ranks = set()
    for name, delta in deltas(made).items():
        squares = torch.linalg.svdvals(whole[f"{name}.weight"]).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[delta.rank - 1] >= 0.8 - 1e-9
        assert delta.rank == 1 or shares[delta.rank - 2] < 0.8
        assert made.report["modules"][name]["kept"] >= 0.8 - 1e-6
        ranks.add(delta.rank)
    assert len(ranks) > 1
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}


def test_a_size_is_spent_where_it_keeps_most(pair: tuple[Path, Path], tmp_path: Path) -> None:
    limit = 40_000
    made = run(pair, tmp_path, max_bytes=limit, rest="ignore", dtype="float32")
    found, whole = deltas(made), differences(*pair)
    size = sum(d.a.numel() + d.b.numel() for d in found.values()) * 4
    assert limit - 4 * (32 + 48) < size <= limit
    # The best that could be: ranks by energy a byte, the last of them cut to what is left.
    ranks = []
    for name, module in made.report["modules"].items():
        cost = 4 * sum(module["shape"])
        squares = torch.linalg.svdvals(whole[f"{name}.weight"]).square()
        ranks += [(float(s) / cost, float(s), cost) for s in squares]
    best, left = 0.0, limit
    for _, square, cost in sorted(ranks, reverse=True):
        best += square * min(1, left / cost)
        left = max(0, left - cost)
    told = made.report["modules"].values()
    kept = sum(m["kept"] * m["norm"] ** 2 for m in told)
    assert best - 0.05 <= kept <= best + 1e-6
    assert {n for n, m in made.report["modules"].items() if m["rank"]} == set(found)


def test_a_size_asks_again_where_its_spectrum_was_too_short() -> None:
    flat = Spectrum([3.0, 3.0], cost=10, whole=False)
    steep = Spectrum([1.0, 0.1], cost=10, whole=True)
    assert allocate({"flat": flat, "steep": steep}, 40) == ({"flat": 2, "steep": 2}, ["flat"])
    more = Spectrum([3.0, 3.0, 2.0, 0.0], cost=10, whole=True)
    assert allocate({"flat": more, "steep": steep}, 40) == ({"flat": 3, "steep": 1}, [])
    assert allocate({"flat": more, "steep": steep}, 1000) == ({"flat": 3, "steep": 2}, [])
    dear = Spectrum([9.0], cost=1000, whole=True)
    assert allocate({"dear": dear, "steep": steep}, 15) == ({"steep": 1}, [])


def test_a_size_for_less_than_one_rank_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="100 bytes hold no rank of any module"):
        run(pair, tmp_path, max_bytes=100)


def test_the_orthogonal_component_leaves_out_what_lies_along_the_base(tmp_path: Path) -> None:
    base = two.model("Llama")
    tuned = two.tuned(base, size=0.02)
    with torch.no_grad():
        for module in (base.model.layers[0].mlp.up_proj, base.model.layers[1].mlp.up_proj):
            name = next(n for n, m in base.named_modules() if m is module)
            tuned.get_submodule(name).weight.add_(0.3 * module.weight)
        tuned.model.layers[0].mlp.down_proj.weight.copy_(base.model.layers[0].mlp.down_proj.weight)
    folders = two.save(base, tmp_path / "base"), two.save(tuned, tmp_path / "tuned")
    made = extract(*folders, tmp_path / "lora", rank="full", component="orthogonal", rest="ignore")
    for name, delta in deltas(made).items():
        weight = base.get_parameter(f"{name}.weight").detach().double()
        dense = delta.dense().double()
        assert abs(float((weight * dense).sum())) < 1e-5 * float(weight.norm() * dense.norm())
    told = made.report["modules"]
    assert told["model.layers.0.mlp.up_proj"]["along_base"] > 0.8
    assert told["model.layers.0.self_attn.q_proj"]["along_base"] < 0.1
    # Nothing of a module that does not differ, and no number that is none.
    assert told["model.layers.0.mlp.down_proj"]["rank"] == 0
    assert "model.layers.0.mlp.down_proj" not in deltas(made)
    assert all(v == v for m in told.values() for v in m.values() if isinstance(v, float))


def test_a_quantile_cuts_entries_and_its_error_is_told(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = extract(*pair, tmp_path / "plain", rank=8, rest="ignore")
    cut = extract(*pair, tmp_path / "cut", rank=8, rest="ignore", clamp_quantile=0.9)
    before, after, whole = deltas(plain), deltas(cut), differences(*pair)
    for name, delta in after.items():
        sizes = torch.cat([before[name].a.flatten(), before[name].b.flatten()]).abs()
        most = float(sizes.quantile(0.9, interpolation="higher"))
        assert float(torch.cat([delta.a.flatten(), delta.b.flatten()]).abs().max()) <= most
        assert float((sizes > most).float().mean()) > 0.05
        matrix = whole[f"{name}.weight"]
        error = float((matrix - delta.dense().double()).norm() / matrix.norm())
        assert cut.report["modules"][name]["error"] == pytest.approx(error, rel=1e-4)
        assert error > plain.report["modules"][name]["error"]


def test_modules_are_named_by_name_end_or_pattern(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def modules(**more: Any) -> set[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return set(deltas(extract(*pair, folder, rank=2, rest="ignore", **more)))

    layers = {f"model.layers.{n}" for n in (0, 1)}
    assert modules(include=["q_proj", "lm_head"]) == {
        *(f"{layer}.self_attn.q_proj" for layer in layers), "lm_head"
    }  # fmt: skip
    assert modules(include=["model.layers.1.mlp.up_proj", "embed_tokens"]) == {
        "model.layers.1.mlp.up_proj", "model.embed_tokens"
    }  # fmt: skip
    assert modules(include=["*.0.mlp.*"], exclude=["down_proj"]) == {
        "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
    }  # fmt: skip
    with pytest.raises(UsageError, match="'qproj' matches no linear module"):
        modules(include=["qproj"])
    with pytest.raises(UsageError, match="no module is left"):
        modules(include=["q_proj"], exclude=["*"])


def test_an_extracted_embedding_is_the_tuned_one(tmp_path: Path) -> None:
    base = two.model("Llama")
    tuned = two.tuned(base, only="embed_tokens")
    folders = two.save(base, tmp_path / "base"), two.save(tuned, tmp_path / "tuned")
    made = extract(*folders, tmp_path / "lora", rank="full", include=["embed_tokens"])
    model = PeftModel.from_pretrained(two.model("Llama"), str(made.path)).eval()
    torch.testing.assert_close(two.logits(model), two.logits(tuned), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_half_precision_is_subtracted_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    base = two.model("Llama")
    folders = tmp_path / "base", tmp_path / "tuned"
    for made, folder in zip((base, two.tuned(base)), folders, strict=True):
        two.save(made, folder)
        path = folder / "model.safetensors"
        tensors = {n: t.to(dtype) for n, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    whole = differences(*folders)
    found = extract(*folders, tmp_path / "lora", rank=6, rest="ignore", dtype="float32")
    for name, delta in deltas(found).items():
        matrix = whole[f"{name}.weight"]
        best = float(torch.linalg.svdvals(matrix)[6:].norm())
        assert float((matrix - delta.dense().double()).norm()) <= 1.001 * best
    auto = extract(*folders, tmp_path / "auto", rank=6, rest="ignore")
    stored = load_file(auto.path / "adapter_model.safetensors")
    wanted = torch.float32 if dtype == torch.float8_e4m3fn else dtype
    assert {t.dtype for t in stored.values()} == {wanted}
    assert auto.report["options"]["dtype"] == str(wanted).removeprefix("torch.")


def test_shards_make_no_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = two.model("Llama"), two.tuned(two.model("Llama"))
    cut = (
        two.save(base, tmp_path / "base", max_shard_size="20KB"),
        two.save(tuned, tmp_path / "tuned", max_shard_size="9KB"),
    )
    assert len(list(cut[0].glob("model-*"))) > 2
    one = extract(*pair, tmp_path / "one" / "lora", rank=5, rest="save")
    many = extract(*cut, tmp_path / "many" / "lora", rank=5, rest="save")
    name = "adapter_model.safetensors"
    assert (one.path / name).read_bytes() == (many.path / name).read_bytes()


def test_a_rank_above_a_matrix_is_all_that_it_has(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = run(pair, tmp_path, rank=1000, rest="ignore")
    assert {m["rank"] for m in made.report["modules"].values()} == {16, 32}
    assert made.report["error"] < 1e-5


def test_what_no_factor_holds_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = differences(*pair)
    made = run(pair, tmp_path, rank=4)
    outside = {n for n in whole if n.removesuffix(".weight") not in made.report["modules"]}
    energy = sum(float(whole[n].square().sum()) for n in outside)
    total = sum(float(d.square().sum()) for d in whole.values())
    assert made.report["rest"]["share"] == pytest.approx(energy / total, rel=1e-5)
    kinds = {what: kind["tensors"] for what, kind in made.report["rest"]["kinds"].items()}
    assert kinds == {"embedding": 1, "norm": 5, "head": 1}
    with pytest.raises(NotApplied, match=r"1 embedding, 5 norms, 1 head: .*% of the whole"):
        extract(*pair, tmp_path / "no", rank=4, rest="error")
    assert not (tmp_path / "no").exists()


def test_added_tokens_are_told_and_saved(tmp_path: Path) -> None:
    base = two.model("Llama")
    tuned = two.tuned(two.model("Llama"))
    tuned.resize_token_embeddings(80, mean_resizing=False)
    folders = two.save(base, tmp_path / "base"), two.save(tuned, tmp_path / "tuned")
    made = extract(*folders, tmp_path / "lora", rank="full", rest="save")
    assert made.report["rest"]["kinds"]["embedding"]["added_rows"] == 9
    grown = two.model("Llama")
    grown.resize_token_embeddings(80, mean_resizing=False)
    model = PeftModel.from_pretrained(grown, str(made.path)).eval()
    torch.testing.assert_close(two.logits(model), two.logits(tuned), rtol=2e-5, atol=2e-5)
    with pytest.raises(UsageError, match=r"embed_tokens is \[71, 32\] in the base and \[80, 32\]"):
        extract(*folders, tmp_path / "no", rank=4, include=["embed_tokens"])


def test_models_that_are_the_same_make_no_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(pair[0], tmp_path / "copied")
    with pytest.raises(NotApplied, match="have the same weights in all 14 modules"):
        extract(pair[0], copied, tmp_path / "lora")
    assert not list(tmp_path.glob("*lora*"))


def test_what_has_no_difference_is_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(tuned: Path) -> str:
        with pytest.raises(BaseModelError) as found:
            extract(pair[0], tuned, tmp_path / "lora")
        assert not list(tmp_path.glob("*lora*"))
        return str(found.value)

    other = two.save(two.model("Mistral"), tmp_path / "mistral")
    assert "is a mistral" in refused(other)
    wide = two.save(two.model("Llama", intermediate_size=64), tmp_path / "wide")
    assert "mlp.gate_proj.weight is [48, 32] in" in refused(wide)
    assert "[64, 32] in" in refused(wide)
    deep = two.save(two.model("Llama", num_hidden_layers=3), tmp_path / "deep")
    assert "has model.layers.2." in refused(deep)

    def damaged(change: Any) -> Path:
        folder = shutil.copytree(pair[1], tmp_path / "damaged", dirs_exist_ok=True)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    def nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    assert "up_proj.weight holds NaN or infinity" in refused(damaged(nan))
    config = json.loads((pair[1] / "config.json").read_text())
    packed = shutil.copytree(pair[1], tmp_path / "packed")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config))
    assert "is quantised (bitsandbytes): packed numbers" in refused(packed)


def test_an_extraction_stands_in_the_registry_with_its_base(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    made = run(pair, tmp_path, rank=4)
    assert made.adapter.record.name == "lora"
    assert made.adapter.record.base.digest == made.report["base"]["digest"]
    assert json.loads((made.path / "lorareg.json").read_text()) == {
        **made.report, "files": ["adapter_config.json", "adapter_model.safetensors"]
    }  # fmt: skip
    assert str(tmp_path) not in (made.path / "lorareg.json").read_text()


def test_one_end_of_a_tied_embedding_is_not_extracted(tmp_path: Path) -> None:
    base = two.model("Qwen2")
    folders = two.save(base, tmp_path / "base"), two.save(two.tuned(base), tmp_path / "tuned")
    with pytest.raises(UsageError, match="embed_tokens is tied to lm_head"):
        extract(*folders, tmp_path / "lora", rank=4, include=["embed_tokens", "q_proj"])


def test_nothing_is_clamped_beside_an_identity(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rank full has no factors to clamp"):
        run(pair, tmp_path, rank="full", clamp_quantile=0.9)


def test_full_rank_of_half_precision_is_kept_in_float32(tmp_path: Path) -> None:
    base = two.model("Llama")
    tuned = two.tuned(base)
    folders = (
        two.save(base.bfloat16(), tmp_path / "base"),
        two.save(tuned.bfloat16(), tmp_path / "tuned"),
    )
    whole = differences(*folders)
    made = extract(*folders, tmp_path / "lora", rank="full", rest="ignore")
    for name, delta in deltas(made).items():
        matrix = whole[f"{name}.weight"]
        torch.testing.assert_close(delta.dense().double(), matrix, rtol=1e-6, atol=0)
    half = extract(*folders, tmp_path / "half", rank="full", rest="ignore", dtype="bfloat16")
    errors = []
    for name, delta in deltas(half).items():
        matrix = whole[f"{name}.weight"]
        errors.append(float((delta.dense().double() - matrix).norm() / matrix.norm()))
        assert half.report["modules"][name]["error"] == pytest.approx(errors[-1], rel=1e-4)
    assert 1e-4 < max(errors) < 1e-2


def test_what_lies_all_along_the_base_leaves_nothing(tmp_path: Path) -> None:
    base = two.model("Llama")
    tuned = two.model("Llama")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    folders = two.save(base, tmp_path / "base"), two.save(tuned, tmp_path / "tuned")
    with pytest.raises(NotApplied, match="have the same weights in all 14 modules"):
        extract(*folders, tmp_path / "lora", rank=4, component="orthogonal", rest="ignore")


def test_a_plot_that_fails_leaves_an_adapter_that_is_known(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OutputError("no room for a figure")

    monkeypatch.setattr("lorahub_registry.api.factored.plot", fails)
    with Registry() as registry:
        with pytest.raises(OutputError, match="no room"):
            run(pair, tmp_path, rank=4, registry=registry, plot_to=tmp_path / "p.png")
        assert registry.get("lora").record.local_path == str(tmp_path / "lora")


@pytest.mark.parametrize("where", ["save_config", "assemble"])
def test_it_goes_on_from_wherever_it_was_stopped(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = run(pair, tmp_path / "whole", rank=4)
    module = {"save_config": files_room, "assemble": factorise}[where]
    really = getattr(module, where)

    def stopped(*words: Any, **more: Any) -> Any:
        if where == "assemble":
            really(*words, **more)
        raise error

    for error in (KeyboardInterrupt(), RuntimeError("out of memory"), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr(module, where, stopped)
            with pytest.raises(type(error)):
                run(pair, tmp_path / "broken", rank=4)
        assert unfinished(tmp_path / "broken" / "lora").exists()
    factors = unfinished(tmp_path / "broken" / "lora") / ".factors"
    next(iter(sorted(factors.iterdir()))).unlink()
    again = run(pair, tmp_path / "broken", rank=4)
    for name in ("adapter_model.safetensors", "adapter_config.json", "lorareg.json"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert not [p for p in again.path.iterdir() if p.name.startswith(".")]


def test_what_a_kill_had_moved_aside_takes_its_place_again(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    made = run(pair, tmp_path, rank=4)
    before = (made.path / "adapter_model.safetensors").read_bytes()
    aside = unfinished(made.path).with_name(".lora.unfinished.old")
    made.path.rename(aside)
    with pytest.raises(OutputError, match="exists and is not empty"):
        run(pair, tmp_path, rank=2)
    assert (made.path / "adapter_model.safetensors").read_bytes() == before
    assert not aside.exists()
    shutil.copytree(made.path, aside)
    run(pair, tmp_path, rank=2, force=True)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory it took")
def test_one_matrix_is_in_memory_at_a_time(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Peak memory, over what a small extraction takes with all imports."""
    folders = tmp_path / "base", tmp_path / "tuned"
    base = two.model(
        "Llama", hidden_size=2048, intermediate_size=16384, num_hidden_layers=1, vocab_size=200,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    two.save(base, folders[0])
    two.save(two.tuned(base, size=0.01), folders[1])
    child = (
        "import sys\n"
        "from lorahub_registry.api.extract import extract\n"
        "def peak():\n"
        "    [line] = [l for l in open('/proc/self/status') if l.startswith('VmHWM')]\n"
        "    return int(line.split()[1]) << 10\n"
        "extract(*sys.argv[4:7], rank=8, rest='ignore')\n"
        "before = peak()\n"
        "extract(*sys.argv[1:4], rank=8, rest='ignore', include=['up_proj', 'q_proj'])\n"
        "print(peak() - before)\n"
    )
    small = [*map(str, pair), str(tmp_path / "small")]
    words = [sys.executable, "-c", child, *map(str, folders), str(tmp_path / "lora"), *small]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    largest = 2048 * 16384 * 4
    assert largest < int(done.stdout) < 2 * largest + (100 << 20)
