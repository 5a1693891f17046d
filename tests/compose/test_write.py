"""The written file: what it cost, that stock PEFT reads it as we do, and a base left clean."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.write import check_applied, write_mixture
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.recipes.fields import OutputRank
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import LowRank, weighted_sum
from lorahub_registry.weights.truncate import truncate
from tests import tiny
from tests.compose.making import deltas, tokens

FULL = OutputRank()


def mixture(model: tiny.Tiny) -> dict[str, LowRank]:
    return weighted_sum([deltas(model, "plain"), deltas(model, "wide")], [0.8, -0.5])


def put(
    folder: Path, base: Any, mixed: Any, rank: OutputRank = FULL, dtype: str = "float32"
) -> Any:
    folder.mkdir(exist_ok=True)
    return write_mixture(folder, mixed, base, rank=rank, dtype=dtype)


def test_a_full_sum_costs_nothing(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    mixed = mixture(tiny_llama)
    written = put(tmp_path, tiny_llama.base(), mixed)
    assert (written.kept, written.total_kept, written.cast_error) == (1.0, 1.0, 0.0)
    assert written.truncation_error == 0.0
    assert written.ranks == {6: 10, 10: 4}
    back = load_deltas(tmp_path, read_facts(tmp_path))
    assert all(torch.equal(back[n].dense(), mixed[n].dense()) for n in mixed)


def test_what_truncation_costs_is_measured(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    mixed = mixture(tiny_llama)
    written = put(tmp_path, tiny_llama.base(), mixed, OutputRank(rank=3))
    assert written.ranks == {3: 14}
    back = load_deltas(tmp_path, read_facts(tmp_path))
    lost, total, least = 0.0, 0.0, 1.0
    for name, delta in mixed.items():
        whole = delta.b.double() @ delta.a.double()
        gone = float((back[name].dense().double() - whole).square().sum())
        energy = float(whole.square().sum())
        lost, total, least = lost + gone, total + energy, min(least, 1 - gone / energy)
    assert written.total_kept == pytest.approx(1 - lost / total, abs=1e-6)
    assert written.kept == pytest.approx(least, abs=1e-6)
    assert 0 < written.kept < written.total_kept < 1
    assert written.truncation_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_a_full_sum_of_more_ranks_than_a_module_has_is_written_at_its_own(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    one = deltas(tiny_llama, "wide")
    mixed = weighted_sum([one, deltas(tiny_llama, "plain")] * 4, [0.8, -0.5, *[0.1] * 6])
    written = put(tmp_path, tiny_llama.base(), mixed)
    assert {d.rank for d in mixed.values()} == {24, 40}
    sizes = {n: min(d.rank, *d.shape) for n, d in mixed.items()}
    assert written.ranks == {16: 4, 24: 8, 32: 2}  # k and v are 16 x 32
    assert (written.kept, written.truncation_error) == (1.0, 0.0)
    back = load_deltas(tmp_path, read_facts(tmp_path))
    for name, delta in mixed.items():
        assert back[name].rank == sizes[name]
        whole = delta.b.double() @ delta.a.double()
        gap = float((back[name].b.double() @ back[name].a.double() - whole).abs().max())
        assert gap <= 2e-6 * float(whole.abs().max())


def test_what_was_truncated_before_is_written_as_it_is(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    mixed = mixture(tiny_llama)
    cut = {name: truncate(delta, rank=2) for name, delta in mixed.items()}
    made = {name: one.delta for name, one in cut.items()}
    written = write_mixture(
        tmp_path, made, tiny_llama.base(), rank=OutputRank(rank=2), dtype="float32", cut=cut
    )
    again = tmp_path / "again"
    once = put(again, tiny_llama.base(), mixed, OutputRank(rank=2))
    assert written == once
    assert written.truncation_error > 0.1
    back = load_deltas(tmp_path, read_facts(tmp_path))
    assert all(torch.equal(back[n].a, made[n].a) for n in made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_with_embeddings_is_written_and_checked(
    tiny_llama: tiny.Tiny, tmp_path: Path, dtype: str
) -> None:
    base = tiny_llama.base()
    mixed = weighted_sum([deltas(tiny_llama, k) for k in ("embedding", "plain")], [0.7, 0.4])
    written = put(tmp_path, base, mixed, OutputRank(rank=3), dtype=dtype)
    assert written.ranks == {3: 5}
    assert check_applied(base, tmp_path, tokens(base)) > 0.1
    assert clean(base, tiny_llama)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_what_the_dtype_costs_is_measured(
    tiny_llama: tiny.Tiny, tmp_path: Path, dtype: str, bits: int
) -> None:
    mixed = mixture(tiny_llama)
    written = put(tmp_path, tiny_llama.base(), mixed, dtype=dtype)
    back = load_deltas(tmp_path, read_facts(tmp_path))
    whole = torch.cat([mixed[n].dense().double().flatten() for n in mixed])
    cast = torch.cat([back[n].dense().double().flatten() for n in mixed])
    assert written.cast_error == pytest.approx(
        float((cast - whole).norm() / whole.norm()), rel=0.01
    )
    assert 0.1 * 2**-bits < written.cast_error < 2**-bits


def test_energy_writes_each_modules_own_rank(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    written = put(tmp_path, tiny_llama.base(), mixture(tiny_llama), OutputRank(energy=0.8))
    assert len(written.ranks) > 1
    assert written.kept >= 0.8
    assert check_applied(tiny_llama.base(), tmp_path, tokens(tiny_llama.base())) > 0.1


def test_a_mixture_of_nothing_is_refused(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    zero = {n: d.scaled(0.0) for n, d in deltas(tiny_llama, "plain").items()}
    for nothing in (zero, {}):
        with pytest.raises(NotApplied, match="delta is zero"):
            put(tmp_path, tiny_llama.base(), nothing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "adapter"), [("llama", "wide"), ("gpt2", "gpt2"), ("t5", "t5")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_peft_loads(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, adapter: str, dtype: str
) -> None:
    model: tiny.Tiny = request.getfixturevalue(f"tiny_{kind}")
    base = model.base()
    put(tmp_path, base, weighted_sum([deltas(model, adapter)], [0.7]), dtype=dtype)
    assert check_applied(base, tmp_path, tokens(base)) > 1e-3


def test_a_half_precision_base_takes_it_too(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base = tiny_llama.base(torch.bfloat16)
    put(tmp_path, base, mixture(tiny_llama))
    assert check_applied(base, tmp_path, tokens(base)) > 0.1


def test_an_adapter_that_changes_nothing_is_refused(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base = tiny_llama.base()
    put(tmp_path, base, mixture(tiny_llama))
    file = tmp_path / "adapter_model.safetensors"
    save_file({n: t * ("lora_A" in n) for n, t in load_file(file).items()}, file)
    with pytest.raises(NotApplied, match="changes nothing"):
        check_applied(base, tmp_path, tokens(base))


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_target_without_tensors_is_refused(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base = tiny_llama.base()
    put(tmp_path, base, deltas(tiny_llama, "plain"))
    edit(tmp_path, target_modules=["q_proj", "v_proj", "k_proj"])
    with pytest.raises(NotApplied, match="missing adapter keys"):
        check_applied(base, tmp_path, tokens(base))
    assert clean(base, tiny_llama)


def test_tensors_that_peft_leaves_out_are_noticed(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base = tiny_llama.base()
    put(tmp_path, base, deltas(tiny_llama, "plain"))
    edit(tmp_path, target_modules=["q_proj"])
    with pytest.raises(NotApplied, match="computes something else"):
        check_applied(base, tmp_path, tokens(base))
    assert clean(base, tiny_llama)


def test_a_reading_of_ours_that_is_not_pefts_is_noticed(
    tiny_llama: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama.base()
    put(tmp_path, base, mixture(tiny_llama))

    def off(folder: Path, facts: Any) -> dict[str, LowRank]:
        return {n: d.scaled(1.05) for n, d in load_deltas(folder, facts).items()}

    monkeypatch.setattr(sys.modules[check_applied.__module__], "load_deltas", off)
    with pytest.raises(NotApplied, match="computes something else"):
        check_applied(base, tmp_path, tokens(base))


def clean(base: Any, model: tiny.Tiny) -> bool:
    """Whether the base is what it was: no wrapper, no leftover, the same weights."""
    fresh = model.model()
    names = [name for name, _ in fresh.named_modules()]
    weights = base.model.state_dict()
    return (
        [name for name, _ in base.model.named_modules()] == names
        and not hasattr(base.model, "peft_config")
        and not any("peft" in type(m).__module__ for m in base.model.modules())
        and not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())
        and not any(p.requires_grad for p in base.model.parameters())
        and all(torch.equal(t, weights[n]) for n, t in fresh.state_dict().items())
    )


def test_stock_peft_leaves_the_base_as_it_was(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    for _ in range(2):
        with stock_peft(base, tiny_llama.adapter("wide")) as wrapped:
            assert wrapped.peft_config.keys() == {"default"}
        assert clean(base, tiny_llama)
    with pytest.raises(ZeroDivisionError), stock_peft(base, tiny_llama.adapter("plain")):
        raise ZeroDivisionError
    assert clean(base, tiny_llama)


def test_a_file_that_peft_cannot_load_leaves_the_base_as_it_was(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    base = tiny_llama.base()
    put(tmp_path, base, mixture(tiny_llama))
    edit(tmp_path, r=3)
    with pytest.raises(NotApplied, match="stock PEFT cannot load it"), stock_peft(base, tmp_path):
        pass
    assert clean(base, tiny_llama)
    path = tmp_path / "adapter_model.safetensors"
    path.unlink()
    with pytest.raises(NotApplied) as caught, stock_peft(base, tmp_path):
        pass
    assert str(caught.value).startswith(f"{path}: no such file")
