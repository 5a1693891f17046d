"""DARE: which entries stay, that chance is fair, and that a streamed model has the same ones."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.api.dare import dare, dare_adapter
from lorahub_registry.errors import BaseModelError, UsageError
from lorahub_registry.progress import silent
from lorahub_registry.weights.dare import CHUNK, PIECE, Drop
from lorahub_registry.weights.drop import drop_model
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.papers import copy_papers
from lorahub_registry.weights.stream.pairs import open_models
from lorahub_registry.weights.stream.part import Part
from tests import tiny
from tests.weights import two
from tests.weights.device import bounded, large, on_cuda


def mask(drop: Drop, name: str, begin: int, end: int) -> torch.Tensor:
    nothing = torch.zeros(PIECE)
    pieces = [m(nothing[: last - first]) for first, last, m in drop.masks(name, begin, end)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.bool)


def test_the_masks_of_a_seed_are_these_and_no_others() -> None:
    found = mask(Drop(0.85, seed=3), "model.norm.weight", CHUNK - 500, CHUNK + 500)
    digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
    assert digest[:16] == "1443fddfe5769606"


WHOLE: dict[float, torch.Tensor] = {}


@given(st.integers(0, 2 * CHUNK + 9), st.integers(0, CHUNK + 9), st.sampled_from([0.0, 0.3, 0.85]))
def test_any_part_of_a_mask_is_that_part_of_the_whole(begin: int, size: int, rate: float) -> None:
    drop, end = Drop(rate, seed=1), 2 * CHUNK + 9
    if rate not in WHOLE:
        WHOLE[rate] = mask(drop, "a", 0, end)
    stop = min(begin + size, end)
    assert torch.equal(mask(drop, "a", begin, max(begin, stop)), WHOLE[rate][begin:stop])


def test_masks_of_other_names_chunks_and_seeds_have_nothing_in_common() -> None:
    n, p = CHUNK, 0.85
    whole = mask(Drop(p), "a", 0, 2 * n)
    ones = [whole[:n], whole[n:], mask(Drop(p), "b", 0, n), mask(Drop(p, seed=1), "a", 0, n)]
    both, each = (1 - p) ** 2, 1 - p
    for i, one in enumerate(ones):
        # Five standard deviations of a share.
        assert abs(one.double().mean() - each) < 5 * math.sqrt(each * p / n)
        for other in ones[:i]:
            shared = (one & other).double().mean()
            assert abs(shared - both) < 5 * math.sqrt(both * (1 - both) / n)


def test_the_mean_over_seeds_is_the_delta() -> None:
    seeds, rate = 400, 0.85
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(64, 64, dtype=torch.float64)
    for seed in range(seeds):
        total += Drop(rate, seed=seed).apply("m", delta.clone()).double()
    # An entry's mean has the standard deviation |d|·√(rate / ((1 − rate)·seeds)).
    z = (total / seeds - delta) / delta.abs() / math.sqrt(rate / (1 - rate) / seeds)
    assert abs(float(z.mean())) < 5 / 64
    assert float(z.abs().max()) < 6
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2) / 64


def test_rescaling_is_by_the_chance_that_is_drawn_with() -> None:
    drop = Drop(0.9)
    assert drop.scale == 2**32 / drop.below
    assert drop.scale == pytest.approx(10, rel=1e-9)
    assert Drop(0.9, rescale=False).scale == 1
    assert Drop(1 - 2**-40).below == 1, "what stays cannot be rescaled by infinity"
    one = torch.ones(1000)
    assert set(Drop(0.75).apply("a", one).tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("rate", [1.0, -0.1, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match=r"has to be in \[0, 1\)"):
        Drop(rate)
    with pytest.raises(UsageError, match="seed is -1"):
        Drop(0.5, seed=-1)


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -2.0, 1e-42, -3e-39, 1e30, 65505.0, 65504.0])


@given(st.lists(VALUES, min_size=1, max_size=60), st.floats(0, 1, exclude_max=True))
def test_by_magnitude_exactly_so_many_stay_and_of_equal_ones_the_first(
    values: list[float], rate: float
) -> None:
    matrix = torch.tensor(values)
    keep = round((1 - rate) * len(values))
    order = sorted(range(len(values)), key=lambda i: (-abs(float(matrix[i])), i))
    expected = torch.zeros_like(matrix)
    expected[order[:keep]] = matrix[order[:keep]]
    made = matrix.clone()
    assert Drop(rate, "magnitude", rescale=False).thin("m", made) == keep
    assert torch.equal(made, expected)


def test_by_magnitude_ties_are_cut_where_pieces_meet() -> None:
    n = CHUNK + PIECE + 5
    matrix = torch.ones(n)
    matrix[7] = 0.5
    drop = Drop(1 - (CHUNK + 3) / n, "magnitude", rescale=False)
    assert drop.thin("m", matrix) == CHUNK + 3
    # One that is smaller lies among the first.
    assert matrix[: CHUNK + 4].sum() == CHUNK + 3
    assert not matrix[CHUNK + 4 :].any()


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base = two.model("Llama")
    return (
        two.save(base, tmp_path / "base"),
        two.save(two.tuned(base), tmp_path / "tuned", max_shard_size="20KB"),
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def cast(folder: Path, dtype: torch.dtype) -> None:
    for file in folder.glob("*.safetensors"):
        held = {n: t.to(dtype) for n, t in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    [file] = folder.glob("*.safetensors")
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


def stream(
    base: Path, tuned: Path, drop: Drop, **more: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The facts of a streamed run, and the tensors that it wrote."""
    out = tuned.parent / "out"
    with open_models(base, tuned) as opened, Part(out, {}) as part:
        try:
            facts = drop_model(opened, drop, part, **more)
            return facts, tensors(part.folder)
        finally:
            part.forget()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other[name])]
        assert torch.equal(*raw), name


@pytest.mark.parametrize("strategy", ["random", "magnitude"])
def test_a_streamed_model_is_base_and_the_dropped_delta(
    strategy: Any, models: tuple[Path, Path]
) -> None:
    base, tuned = tensors(models[0]), tensors(models[1])
    drop = Drop(0.6, strategy, seed=5)
    facts, made = stream(*models, drop)
    assert list(facts) == list(made)
    for name, found in made.items():
        delta = tuned[name] - base[name]
        dropped = drop.apply(name, delta.clone())
        assert torch.equal(found, base[name] + dropped), name
        told = facts[name]
        stays = dropped != 0
        assert told["entries"] == delta.numel()
        assert told["kept"] == int(stays.sum())
        assert told["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        share = float((delta * stays).norm() / delta.norm()) ** 2
        assert told["energy_kept"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("strategy", ["random", "magnitude"])
def test_neither_shards_order_blocks_nor_workers_change_it(
    strategy: Any, models: tuple[Path, Path]
) -> None:
    base, tuned = models
    drop = Drop(0.7, strategy, seed=2)
    _, first = stream(base, tuned, drop, workers=1)
    for block, workers in ((1, 2), (77, 3), (1 << 22, 2)):
        same(stream(base, tuned, drop, block=block, workers=workers)[1], first)
    held = tensors(tuned)
    one = base.with_name("one")
    shutil.copytree(tuned, one, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(dict(reversed(held.items())), one / "model.safetensors", metadata={"format": "pt"})
    same(dict(sorted(stream(base, one, drop)[1].items())), dict(sorted(first.items())))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["random", "magnitude"])
def test_the_type_is_kept_and_rate_0_is_the_tuned_model(
    strategy: Any, dtype: torch.dtype, models: tuple[Path, Path]
) -> None:
    for folder in models:
        cast(folder, dtype)
    same(stream(*models, Drop(0, strategy))[1], tensors(models[1]))
    # What stays without rescaling is the tuned number itself, float32 or not.
    base, tuned = tensors(models[0]), tensors(models[1])
    drop = Drop(0.5, strategy, rescale=False)
    for name, found in stream(*models, drop)[1].items():
        assert found.dtype == dtype
        delta = tuned[name].float() - base[name].float()
        stays = drop.apply(name, delta.clone()) != 0
        expected = torch.where(stays, tuned[name].float(), base[name].float())
        assert torch.equal(found.float(), expected)


def test_by_magnitude_nothing_may_stay_of_a_small_tensor(models: tuple[Path, Path]) -> None:
    facts, made = stream(*models, Drop(0.999, "magnitude"))
    name = "model.norm.weight"
    assert facts[name]["kept"] == 0
    assert torch.equal(made[name], tensors(models[0])[name])
    assert facts["lm_head.weight"]["kept"] == round(0.001 * 71 * 32)


def test_added_rows_are_copied_and_the_others_are_as_without_them(
    models: tuple[Path, Path],
) -> None:
    base, tuned = models
    drop = Drop(0.5, "magnitude", seed=4)
    plain = stream(base, tuned, drop)[1]
    names = ("model.embed_tokens.weight", "lm_head.weight")
    more = torch.randn(3, 32)
    for file in tuned.glob("*.safetensors"):
        held = load_file(file)
        for name in names:
            if name in held:
                held[name] = torch.cat([held[name], more])
        save_file(held, file, metadata={"format": "pt"})
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"vocab_size": 74}))
    facts, made = stream(base, tuned, drop, block=64)
    for name in names:
        assert torch.equal(made[name][:71], plain[name])
        assert torch.equal(made[name][71:], more)
        assert facts[name]["entries"] == 71 * 32


def test_a_tied_head_that_is_stored_twice_stays_tied(tmp_path: Path) -> None:
    base = two.model("Qwen2")
    folders = [two.save(m, tmp_path / n) for m, n in ((base, "b"), (two.tuned(base), "t"))]
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    edit(folders[1], lambda held: held.update({head: held[table].clone()}))
    made = stream(*folders, Drop(0.5))[1]
    assert torch.equal(made[head], made[table])
    assert not torch.equal(made[head], tensors(folders[1])[table])


class Talk:
    """What was warned of."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def task(self, title: str, total: float | None = None, unit: str = "") -> Any:
        return silent.task(title, total, unit)

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warned.append(text)


def test_experts_that_transformers_joins_are_dropped_as_they_are_stored(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.MixtralConfig(**two.SMALL, head_dim=8, num_local_experts=2)
    base = transformers.MixtralForCausalLM(config)
    folders = [two.save(m, tmp_path / n) for m, n in ((base, "b"), (two.tuned(base), "t"))]
    before, after = map(tensors, folders)
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert expert in before
    drop, talk = Drop(0.5), Talk()
    facts, made = stream(*folders, drop, progress=talk)
    assert talk.warned == []
    assert facts.keys() == after.keys()
    for name, tensor in after.items():
        if name in {expert, "model.norm.weight", "lm_head.weight"}:
            dropped = drop.apply(name, tensor - before[name])
            assert torch.equal(made[name], before[name] + dropped)
        assert not torch.equal(made[name], tensor)
    # Of another shape there is still nothing to subtract.
    edit(folders[0], lambda held: held.update({expert: held[expert][1:].clone()}))
    facts, made = stream(*folders, drop, progress=talk)
    assert expert not in facts
    assert torch.equal(made[expert], after[expert])
    assert talk.warned[0].startswith(f"{expert}: copied as they are")


def untied(name: str, folder: Path) -> Path:
    """A tuned model of this kind whose head is a parameter of its own."""
    made = two.model(name, tie_word_embeddings=False)
    made.load_state_dict(two.model(name).state_dict())
    return two.save(two.tuned(made), folder)


def test_a_head_apart_is_dropped_from_the_tied_one(tmp_path: Path) -> None:
    base, tuned = two.save(two.model("GPT2"), tmp_path / "b"), untied("GPT2", tmp_path / "t")
    head, table = "lm_head.weight", "transformer.wte.weight"
    before, after, drop = tensors(base), tensors(tuned), Drop(0.5)
    facts, made = stream(base, tuned, drop)
    assert head in facts
    for name in (head, table):
        dropped = drop.apply(name, after[name] - before[table])
        assert torch.equal(made[name], before[table] + dropped)
    # A tied model has one place for both: its table's difference is what is dropped.
    talk = Talk()
    facts, made = stream(tuned, base, drop, progress=talk)
    assert head not in made
    assert torch.equal(made[table], after[table] + drop.apply(table, before[table] - after[table]))
    assert talk.warned[0].startswith(f"{head} is tied in the tuned model")


@pytest.mark.parametrize("name", ["GPT2", "T5", "Qwen2"])
def test_a_written_model_of_another_architecture_loads_with_its_head_tied(
    name: str, tmp_path: Path
) -> None:
    before = two.model(name)
    base = two.save(before, tmp_path / "base")
    tuned = two.save(two.tuned(before), tmp_path / "tuned", max_shard_size="30KB")
    drop, out = Drop(0.5), tmp_path / "out"
    with open_models(base, tuned) as opened, Part(out, {}) as part:
        facts = drop_model(opened, drop, part)
        copy_papers(tuned, part.folder)
        loaded = type(before).from_pretrained(part.folder).eval()
    tables = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert tables[0].data_ptr() == tables[1].data_ptr()
    held = dict(before.named_parameters())
    changed = dict(two.tuned(before).named_parameters())
    assert sum(part["entries"] for part in facts.values()) == sum(p.numel() for p in held.values())
    for parameter, value in loaded.named_parameters():
        delta = (changed[parameter] - held[parameter]).detach()
        expected = held[parameter].detach() + drop.apply(parameter, delta)
        assert torch.equal(value.detach(), expected), parameter
    assert torch.isfinite(two.logits(loaded)).all()


def test_equal_models_and_numbers_that_are_none_are_refused(models: tuple[Path, Path]) -> None:
    base, tuned = models
    with pytest.raises(BaseModelError, match="nothing to drop"):
        stream(base, base, Drop(0.5))

    def spoil(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan

    edit(base, spoil)
    for strategy in ("random", "magnitude"):
        with pytest.raises(BaseModelError, match=r"base/model\.safetensors: model\.layers\.1.*NaN"):
            stream(base, tuned, Drop(0.5, strategy))  # type: ignore[arg-type]


def test_a_number_that_outgrows_its_type_is_refused(models: tuple[Path, Path]) -> None:
    edit(models[0], lambda held: held["model.norm.weight"].fill_(-60000))
    for folder in models:
        cast(folder, torch.float16)
    with pytest.raises(BaseModelError, match=r"model\.norm\.weight: .* more than float16 holds"):
        stream(*models, Drop(0.75))
    stream(*models, Drop(0.75, rescale=False))


def test_squares_beyond_float32_are_counted(models: tuple[Path, Path]) -> None:
    edit(models[0], lambda held: held["model.norm.weight"].fill_(1e25))
    facts, _ = stream(*models, Drop(0.5))
    assert facts["model.norm.weight"]["norm"] == pytest.approx(1e25 * math.sqrt(32), rel=1e-6)


def test_papers_are_copied_and_what_is_no_paper_is_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    wanted = {"config.json", "merges.txt", "tokenizer.model", "LICENSE", "chat_template.jinja"}
    unwanted = {
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json",
        "tokenizer.pkl", "optimizer.pt", "trainer_state.json", "training_args.bin",
        "adapter_config.json", "lorareg.json", ".hidden.json", "README.md", "modeling_x.py",
    }  # fmt: skip
    for folder in (source / "checkpoint.json", source / "additional_chat_templates", target):
        folder.mkdir(parents=True)
    for name in wanted | unwanted:
        (source / name).write_text(name)
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    (source / "link.json").symlink_to(source / "config.json")
    found = copy_papers(source, target)
    assert set(found) == wanted | {"link.json", "additional_chat_templates"}
    assert sorted(found) == sorted(p.name for p in target.iterdir())
    assert (target / "link.json").read_text() == "config.json"
    assert not (target / "link.json").is_symlink()
    assert (target / "additional_chat_templates" / "tool.jinja").is_file()


def test_a_model_is_not_dropped_on_a_device(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = map(str, models)
    with pytest.raises(UsageError, match="a model is not dropped on cuda"):
        dare(base, tuned, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
    dare(base, tuned, tmp_path / "one")
    dare(base, tuned, tmp_path / "other", device="cpu")
    same(tensors(tmp_path / "one"), tensors(tmp_path / "other"))


def test_a_lora_of_the_dropped_change_is_computed_on_the_cpu_by_default(
    models: tuple[Path, Path], tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    base, tuned = map(str, models)
    made = [dare(base, tuned, tmp_path / n, to_lora=4, **o).report for n, o in PLACES.items()]
    assert made[0] == made[1]
    assert made[0]["options"]["device"] == "cpu"
    adapter = tiny_llama.adapter("wide")
    thin = [dare_adapter(adapter, tmp_path / f"{n}-a", **o).report for n, o in PLACES.items()]
    assert thin[0] == thin[1]
    assert thin[0]["options"]["device"] == "cpu"
    for kind in ("", "-a"):
        same(tensors(tmp_path / f"one{kind}"), tensors(tmp_path / f"other{kind}"))


PLACES: dict[str, dict[str, Any]] = {"one": {}, "other": {"device": "cpu"}}


def products(folder: Path) -> dict[str, torch.Tensor]:
    return {n: d.dense() for n, d in load_deltas(folder, read_facts(folder)).items()}


@on_cuda
@pytest.mark.parametrize("strategy", ["random", "magnitude"])
def test_cuda_drops_the_same_entries_and_cuts_alike(
    strategy: Any, models: tuple[Path, Path], tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    base, tuned = map(str, models)

    def all_of(device: str) -> list[dict[str, Any]]:
        out = tmp_path / device
        full, cut = (
            dare(
                base, tuned, out / str(rank), strategy=strategy, to_lora=rank, device=device
            ).report
            for rank in ("full", 4)
        )  # type: ignore[misc]
        thin = dare_adapter(
            tiny_llama.adapter("wide"), out / "thin", rate=0.5, strategy=strategy,
            rank=32, device=device,
        ).report  # fmt: skip
        return [full, cut, thin]

    cpu, cuda = all_of("cpu"), all_of("cuda")
    for before, after in zip(cpu, cuda, strict=True):
        assert after["options"] == before["options"] | {"device": "cuda"}
        assert after["error"] == pytest.approx(before["error"], rel=1e-3, abs=1e-5)
    assert cuda[2]["total"]["kept"] == cpu[2]["total"]["kept"]
    for place in ("full", "thin"):
        one, other = (products(tmp_path / device / place) for device in ("cpu", "cuda"))
        for name, product in one.items():
            torch.testing.assert_close(other[name], product, rtol=1e-4, atol=1e-5, msg=name)


@on_cuda
def test_what_a_device_holds_of_two_models_or_an_adapter_is_bounded(tmp_path: Path) -> None:
    base, tuned, lora = tmp_path / "base", tmp_path / "tuned", tmp_path / "lora"
    large(base)
    largest = large(tuned, seed=1)
    made = []
    for device in ("cpu", "cuda"):
        with bounded(largest) if device == "cuda" else nullcontext():
            found = dare(str(base), str(tuned), lora / device, to_lora=8, device=device)
        made.append(found.report["error"])
        with bounded(largest) if device == "cuda" else nullcontext():
            thin = tmp_path / "thin" / device
            found = dare_adapter(lora / "cpu", thin, rate=0.5, device=device)
        made.append(found.report["error"])
    assert made[2:] == pytest.approx(made[:2], rel=1e-3)
