"""Pairs of adapters: cosine and interference as the dense matrices give them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.weights.compare import compare
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import LowRank


def random(seed: int, rank: int = 3, fan_in: int = 9, fan_out: int = 7) -> LowRank:
    made = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, fan_in, generator=made)
    return LowRank(a, torch.randn(fan_out, rank, generator=made))


def dense(delta: LowRank) -> torch.Tensor:
    return delta.b.double() @ delta.a.double()


def felt(one: LowRank, other: LowRank) -> float:
    """‖ΔW_other V_one‖, from a dense SVD."""
    _, s, vh = torch.linalg.svd(dense(one))
    return float((dense(other) @ vh[: int((s > 1e-5 * s[0]).sum())].T).norm())


def test_a_pair_is_what_the_dense_matrices_say():
    one, other = {"p": random(1), "q": random(2)}, {"p": random(3, rank=5), "q": random(4)}
    [pair] = compare([one, other])
    for meeting in pair.meetings:
        x, y = one[meeting.module], other[meeting.module]
        norms = float(dense(x).norm()), float(dense(y).norm())
        assert meeting.norms == pytest.approx(norms)
        assert meeting.cosine == pytest.approx(
            float((dense(x) * dense(y)).sum()) / norms[0] / norms[1], abs=1e-7
        )
        assert meeting.interference == pytest.approx((felt(x, y) / norms[0], felt(y, x) / norms[1]))
    whole = [torch.cat([dense(d[m]).flatten() for m in "pq"]) for d in (one, other)]
    assert pair.cosine == pytest.approx(
        float(torch.nn.functional.cosine_similarity(*whole, dim=0)), abs=1e-7
    )
    expected = sum(felt(one[m], other[m]) ** 2 for m in "pq") ** 0.5 / float(whole[0].norm())
    assert pair.interference[0] == pytest.approx(expected)


def test_an_adapter_beside_itself_is_as_loud_as_itself():
    one = {"p": random(1), "q": random(2)}
    twice = {name: delta.scaled(-2) for name, delta in one.items()}
    [pair] = compare([one, twice])
    assert pair.cosine == pytest.approx(-1)
    assert pair.interference == pytest.approx((2, 0.5))


def test_where_nothing_is_read_in_common_nothing_is_felt():
    a = torch.eye(6)
    one = {"p": LowRank(a[:2], torch.ones(5, 2))}
    other = {"p": LowRank(a[3:], torch.ones(5, 3))}
    [pair] = compare([one, other])
    assert pair.interference == pytest.approx((0, 0), abs=1e-12)
    assert pair.cosine == pytest.approx(0, abs=1e-12)


def test_only_the_row_space_counts_and_not_how_the_factors_span_it():
    # Rank 2 on paper, 1 in truth: B's second column is the first one's double.
    b = torch.tensor([[1.0], [0.0], [2.0]])
    one = {"p": LowRank(torch.eye(4)[:2], torch.cat([b, 2 * b], 1))}
    other = {"p": LowRank(torch.tensor([[2.0, -1.0, 0.0, 0.0]]), torch.ones(3, 1))}
    [pair] = compare([one, other])  # ΔW₁ reads (1, 2, 0, 0) alone
    assert pair.interference[0] == pytest.approx(0, abs=1e-6)


def test_modules_that_only_one_has_count_for_its_size():
    shared, own = random(1), random(2)
    [pair] = compare([{"p": shared, "q": own}, {"p": shared}])
    assert [m.module for m in pair.meetings] == ["p"]
    assert pair.alone == (1, 0)
    size = float(dense(shared).norm())
    whole = (size**2 + float(dense(own).norm()) ** 2) ** 0.5
    assert pair.interference == pytest.approx((size / whole, 1))
    assert pair.cosine == pytest.approx(size / whole)
    [apart] = compare([{"p": shared}, {"q": own}])
    assert (apart.meetings, apart.alone, apart.interference) == ((), (1, 1), (0, 0))


def test_what_changes_nothing_feels_nothing():
    zero = {"p": LowRank(torch.zeros(2, 9), torch.zeros(7, 2))}
    [pair] = compare([zero, {"p": random(1)}])
    assert (pair.cosine, pair.interference) == (None, (None, 0))


def test_layers_gather_their_modules():
    names = ["m.layers.1.q", "m.layers.1.v", "m.layers.10.q", "m.layers.2.q", "head"]
    one = {name: random(n) for n, name in enumerate(names)}
    other = {name: random(n + 50) for n, name in enumerate(names)}
    [pair] = compare([one, other])
    layers = pair.by_layer()
    assert list(layers) == [("", None), *(("m.layers", n) for n in (1, 2, 10))]
    first = [m for m in pair.meetings if m.module.startswith("m.layers.1.")]
    size = sum(m.norms[1] ** 2 for m in first) ** 0.5
    assert layers["m.layers", 1][1] == pytest.approx(
        sum(m.felt[1] ** 2 for m in first) ** 0.5 / size
    )


def test_all_pairs_in_order():
    pairs = compare([{"p": random(n)} for n in range(4)])
    assert [(p.first, p.second) for p in pairs] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    [alone] = compare([{"p": random(1)}, {"p": random(3)}])
    assert pairs[4].interference == alone.interference
    assert pairs[4].norms == alone.norms


def test_other_shapes_are_refused():
    with pytest.raises(IncompatibleAdapters, match=r"7x9.*7x8"):
        compare([{"p": random(1)}, {"p": random(2, fan_in=8)}])


@pytest.mark.data
def test_real_adapters_drown_each_other_as_their_losses_say(data: Path):
    """`zog_upper`: upper drowns zog and hardly hears it; `zog_arr`: neither drowns the other."""
    for base in ("stories260k", "babyllama105"):
        folders = [data / "adapters" / base / name for name in ("zog", "upper", "arr")]
        pairs = compare([load_deltas(f, read_facts(f)) for f in folders])
        zog_upper, zog_arr, upper_arr = (p.interference for p in pairs)
        assert zog_upper[0] > 1.8
        assert zog_upper[1] < 0.3
        assert upper_arr[0] < 0.3
        assert upper_arr[1] > 1.8
        assert max(zog_arr) < 0.9
