"""An adapter of another rank: the nearest, as PEFT applies it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.api.resize import resize
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, NotApplied
from lorahub_registry.weights.files import load_deltas
from tests import tiny
from tests.weights import two


@pytest.mark.parametrize("kind", ["wide", "patterns", "rslora", "embedding", "head"])
@pytest.mark.parametrize("rank", [1, 3])
def test_every_delta_is_the_nearest_of_its_rank(
    tiny_llama: tiny.Tiny, tmp_path: Path, kind: str, rank: int
) -> None:
    folder = tiny_llama.adapter(kind)
    made = resize(folder, tmp_path / "small", rank=rank)
    before, after = (load_deltas(f, read_facts(f)) for f in (folder, made.path))
    assert before.keys() == after.keys()
    for name, delta in before.items():
        dense = delta.dense().double()
        values = torch.linalg.svdvals(dense)
        error = float((dense - after[name].dense().double()).norm())
        assert error <= 1.0001 * float(values[rank:].norm()) + 1e-6
        told = made.report["modules"][name]
        assert told["rank"] == min(rank, delta.rank)
        assert told["error"] == pytest.approx(error / float(dense.norm()), rel=1e-3, abs=1e-6)
    assert {m.scaling for m in read_facts(made.path).modules} == {1.0}


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_all_of_it_with_alpha_as_the_rank_is_the_same_model(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    model: tiny.Tiny = request.getfixturevalue(f"tiny_{kind}")
    made = resize(model.adapter(kind), tmp_path / "same", rank="full")
    found = PeftModel.from_pretrained(model.model(), str(made.path)).eval()
    wanted, plain = model.peft(kind), model.model()
    torch.testing.assert_close(two.logits(found), two.logits(wanted), rtol=1e-5, atol=1e-5)
    assert float((two.logits(plain) - two.logits(wanted)).abs().max()) > 1e-2
    assert made.report["error"] < 1e-6


def test_an_energy_and_a_size_choose_ranks(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    folder = tiny_llama.adapter("wide")
    made = resize(folder, tmp_path / "energy", energy=0.7)
    for name, delta in load_deltas(folder, read_facts(folder)).items():
        squares = torch.linalg.svdvals(delta.dense().double()).square()
        shares = squares.cumsum(0) / squares.sum()
        rank = made.report["modules"][name]["rank"]
        assert shares[rank - 1] >= 0.7 - 1e-9
        assert rank == 1 or shares[rank - 2] < 0.7
    small = resize(folder, tmp_path / "size", max_bytes=8_000)
    modules = small.report["modules"].values()
    assert 7_000 < sum(m["rank"] * sum(m["shape"]) * 4 for m in modules) <= 8_000
    assert len({m["rank"] for m in modules}) > 1


def test_a_half_precision_adapter_stays_one(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    source = tiny_llama.adapter("wide")
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    made = resize(folder, tmp_path / "small", rank=6)
    stored = load_file(made.path / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    # All ranks are there: what is told is the rounding.
    assert 1e-4 < made.report["error"] < 5e-3


@pytest.mark.parametrize("kind", ["dora", "bias", "lora_bias", "modules_to_save", "ia3"])
def test_what_is_more_than_its_deltas_is_refused(
    tiny_llama: tiny.Tiny, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(IncompatibleAdapters):
        resize(tiny_llama.adapter(kind), tmp_path / "no", rank=2)
    assert not list(tmp_path.glob("*no*"))


def test_nothing_and_no_number_are_refused(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    def changed(change: object) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        source = tiny_llama.adapter("plain")
        (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
        tensors = load_file(source / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.fill_(change)  # type: ignore[arg-type]
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    with pytest.raises(NotApplied, match="all its deltas are zero"):
        resize(changed(0.0), tmp_path / "no", rank=2)
    with pytest.raises(BrokenAdapter, match="holds NaN or infinity"):
        resize(changed(float("inf")), tmp_path / "no", rank=2)
    assert not list(tmp_path.glob("*no*"))
