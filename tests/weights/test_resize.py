"""An adapter of another rank: the nearest, as PEFT applies it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.api.resize import resize
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, NotApplied
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import LowRank
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


def rewritten(
    source: Path,
    folder: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    **config: object,
) -> Path:
    """A copy of an adapter with other tensors and more in its config."""
    folder.mkdir()
    told = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({n: change(n, t) for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("asked", [{"rank": 3}, {"energy": 0.8}, {"rank": "full"}])
def test_factors_as_large_as_the_matrix_are_multiplied_once(
    tiny_llama: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    drawn = torch.Generator().manual_seed(5)

    def large(name: str, tensor: torch.Tensor) -> torch.Tensor:
        other = tensor.shape["lora_A" in name]
        shape = (20, other) if "lora_A" in name else (tensor.shape[0], 20)
        return torch.randn(shape, generator=drawn)

    folder = rewritten(tiny_llama.adapter("wide"), tmp_path / "large", large, r=20, lora_alpha=20)

    def no_qr(delta: LowRank) -> None:
        raise AssertionError("QR of factors that are larger than their product")

    monkeypatch.setattr(LowRank, "core", no_qr)
    made = resize(folder, tmp_path / "made", **asked)
    after = load_deltas(made.path, read_facts(made.path))
    for name, delta in load_deltas(folder, read_facts(folder)).items():
        dense, told = delta.to("cpu", torch.float64).dense(), made.report["modules"][name]
        values = torch.linalg.svdvals(dense)
        full = min(20, *dense.shape)
        shares = values.square().cumsum(0) / values.square().sum()
        expected = {"rank": asked.get("rank"), "energy": int((shares < 0.8).sum()) + 1}
        rank = expected[next(iter(asked))]
        assert told["rank"] == (full if rank == "full" else rank)
        error = float((dense - after[name].dense().double()).norm())
        assert told["norm"] == pytest.approx(float(dense.norm()), rel=1e-6)
        assert told["error"] == pytest.approx(error / float(dense.norm()), rel=1e-3, abs=1e-6)
        assert error <= 1.001 * float(values[told["rank"] :].norm()) + 1e-4


def test_a_size_of_large_factors_is_kept(
    tiny_llama: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama.adapter("wide")
    plain = resize(folder, tmp_path / "plain", max_bytes=8_000)
    monkeypatch.setattr("lorahub_registry.weights.resize._large", lambda delta: True)
    dense = resize(folder, tmp_path / "dense", max_bytes=8_000)
    for name, told in plain.report["modules"].items():
        other = dense.report["modules"][name]
        assert told["rank"] == other["rank"]
        for key in ("norm", "kept", "error", "effective_rank"):
            assert told[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)


def test_what_the_type_cannot_hold_is_refused(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    folder = rewritten(
        tiny_llama.adapter("plain"), tmp_path / "huge", lambda name, tensor: tensor * 1e6
    )
    with pytest.raises(NotApplied, match=r"q_proj: its factors are more than float16 holds"):
        resize(folder, tmp_path / "no", rank=2, dtype="float16")
    resize(folder, tmp_path / "yes", rank=2, dtype="bfloat16")


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
