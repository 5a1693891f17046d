"""The operator: the dense formula in float64 for every kind of base, row by row, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import stateless

from lorahub_registry.compose.forms import DeltaForm, Layout
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.apply import applied
from lorahub_registry.runtime.mixture import RowsMerged
from lorahub_registry.runtime.operator import Operator, adaptable, stacked
from lorahub_registry.weights.lowrank import LowRank
from tests import tiny
from tests.compose.making import deltas

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 9], [1, 77, 8, 90, 13, 200, 3], [1, 5, 6, 7, 8, 9, 10]])


def logits(model: Any) -> torch.Tensor:
    """Of three rows; in the model's own precision."""
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits
    return model(input_ids=IDS).logits


def noise(model: tiny.Tiny, like: dict[str, LowRank], seed: int) -> dict[str, LowRank]:
    """Another adapter on the same modules, of rank 3."""
    made = torch.Generator().manual_seed(seed)
    found = {}
    for name, delta in like.items():
        fan_out, fan_in = delta.shape
        a, b = (torch.randn(shape, generator=made) for shape in ((3, fan_in), (fan_out, 3)))
        found[name] = LowRank(a * 0.2, b * 0.2, delta.kind)
    return found


@pytest.fixture(params=["llama", "llama embedding", "gpt2", "t5"])
def case(request: pytest.FixtureRequest) -> tuple[tiny.Tiny, list[dict[str, LowRank]]]:
    """A tiny model, and adapters of unequal ranks and targets on it."""
    kind, _, more = request.param.partition(" ")
    model: tiny.Tiny = request.getfixturevalue(f"tiny_{kind}")
    if kind == "llama":
        kinds = ("embedding", "head", "plain") if more else ("plain", "wide", "patterns")
        return model, [deltas(model, name) for name in kinds]
    one = deltas(model, kind)
    half = dict(list(one.items())[::2])
    return model, [one, noise(model, half, 1), noise(model, one, 2)]


def summed(
    model: tiny.Tiny, adapters: Sequence[dict[str, LowRank]], c: Sequence[float]
) -> torch.Tensor:
    """The logits of the model with Σ c·B·A added to its weights, all of it dense and float64."""
    exact = model.model().double()
    for deltas_, x in zip(adapters, c, strict=True):
        for name, delta in deltas_.items():
            module = exact.get_submodule(name)
            change = x * delta.b.double() @ delta.a.double()
            turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
            module.weight.data += change.T if turned else change
    with torch.inference_mode():
        return logits(exact)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.std())
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-5 * scale)


def test_it_is_the_dense_sum(case: tuple[tiny.Tiny, list[dict[str, LowRank]]]) -> None:
    model, adapters = case
    c = [0.75, -0.5, 1.25]
    bare = model.model()
    with torch.inference_mode(), Operator(bare, stacked(adapters)) as operator:
        operator.set(torch.tensor(c))
        found = logits(bare)
    expected = summed(model, adapters, c)
    close(found, expected)
    assert float((expected - summed(model, adapters, [0, 0, 0])).std()) > 0.05


def test_each_row_has_the_adapters_that_it_would_have_alone(
    case: tuple[tiny.Tiny, list[dict[str, LowRank]]],
) -> None:
    model, adapters = case
    each = [[1.0, 0.0, -0.5], [0.0, 0.0, 0.0], [0.25, 1.5, 0.0]]
    bare = model.model()
    with torch.inference_mode(), Operator(bare, stacked(adapters)) as operator:
        operator.set(torch.tensor(each)[:, None])
        found = logits(bare)
    for row, c in enumerate(each):
        close(found[row], summed(model, adapters, c)[row])


def test_it_is_what_stock_peft_gives(case: tuple[tiny.Tiny, list[dict[str, LowRank]]]) -> None:
    model, adapters = case
    kinds = {"gpt2": "gpt2", "t5": "t5"}
    kind = kinds.get(model.kind, "embedding" if "model.embed_tokens" in adapters[0] else "plain")
    bare = model.model()
    with torch.inference_mode(), Operator(bare, stacked(adapters)) as operator:
        operator.set(torch.tensor([1.0, 0.0, 0.0]))
        close(logits(bare), logits(model.peft(kind)))


def test_a_bf16_base_keeps_its_weights_and_agrees_with_peft(tiny_llama: tiny.Tiny) -> None:
    from peft import PeftModel

    bare = tiny_llama.model().to(torch.bfloat16)
    before = {n: t.clone() for n, t in bare.state_dict().items()}
    peft = PeftModel.from_pretrained(
        tiny_llama.model().to(torch.bfloat16), str(tiny_llama.adapter("wide"))
    ).eval()
    adapters = [deltas(tiny_llama, kind) for kind in ("plain", "wide", "embedding")]
    with torch.inference_mode():
        base, theirs = logits(bare).float(), logits(peft).float()
        with Operator(bare, stacked(adapters)) as operator:
            operator.set(torch.tensor([0.0, 1.0, 0.0]))
            ours = logits(bare)
            operator.set(torch.tensor([[0.0, 1.0, 0.0]] * 3)[:, None])
            rows = logits(bare)
    assert ours.dtype == torch.bfloat16
    assert float((theirs - base).norm()) > 0.2 * float(base.norm())
    assert float((ours.float() - theirs).norm()) < 0.01 * float(theirs.norm())
    assert float((rows.float() - theirs).norm()) < 0.01 * float(theirs.norm())
    assert all(torch.equal(before[n], t) for n, t in bare.state_dict().items())


def test_its_gradient_in_the_coefficients_is_that_of_the_dense_formula(
    case: tuple[tiny.Tiny, list[dict[str, LowRank]]],
) -> None:
    model, adapters = case
    exact = model.model().double().requires_grad_(False)
    double = [{n: d.to("cpu", torch.float64) for n, d in each.items()} for each in adapters]
    direction = torch.randn(exact.config.vocab_size, generator=torch.Generator().manual_seed(3))
    point = [0.5, -0.25, 0.75]
    c, same = (torch.tensor(point, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with Operator(exact, stacked(double)) as operator:
        operator.set(c)
        (logits(exact).tanh() @ direction.double()).sum().backward()
    weights = {}
    for name in {name for each in double for name in each}:
        module = exact.get_submodule(name)
        turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        change = sum(x * each[name].dense() for x, each in zip(same, double, strict=True)
                     if name in each)  # fmt: skip
        weights[f"{name}.weight"] = module.weight + (change.T if turned else change)
    with stateless._reparametrize_module(exact, weights):
        (logits(exact).tanh() @ direction.double()).sum().backward()
    assert c.grad is not None
    assert same.grad is not None
    torch.testing.assert_close(c.grad, same.grad, rtol=1e-5, atol=0)


def test_modules_take_the_coefficients_of_their_set(tiny_llama: tiny.Tiny) -> None:
    adapters = [deltas(tiny_llama, kind) for kind in ("plain", "wide")]
    names = {name for each in adapters for name in each}
    # Every adapter is in both halves; "plain" on 4 of the 14 modules.
    for per, size in (("layer_group", 4), ("module", 14 + 4)):
        layout = Layout(names, per, 2)
        form = DeltaForm(adapters, layout=layout)
        assert form.size == len(form.pairs) == size
        made = torch.Generator().manual_seed(5)
        c = torch.randn(form.size, generator=made)
        bare = tiny_llama.model()
        with torch.inference_mode():
            assert form.stacks is not None
            with Operator(bare, form.stacks) as operator:
                operator.set(c)
                found = logits(bare)
                operator.set(c.repeat(3, 1)[:, None])
                close(logits(bare), found)
            # Each module by hand: its own set's coefficients, adapter after adapter.
            own = [
                {
                    name: d.scaled(float(c[form.pairs.index((layout(name), i))]))
                    for name, d in each.items()
                }
                for i, each in enumerate(adapters)
            ]
            close(found, summed(tiny_llama, own, [1.0, 1.0]))
            with applied(bare, form.at(c.tolist())):
                close(logits(bare), found)


@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    c=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_any_ranks_make_one_stack_that_is_their_sum(
    ranks: list[int], c: list[float], seed: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    layer = nn.Sequential(nn.Linear(5, 6, bias=False))
    adapters = [
        {"0": LowRank(torch.randn(r, 5, generator=made), torch.randn(6, r, generator=made))}
        for r in ranks
    ]
    stacks = stacked(adapters)
    assert stacks["0"].owner.tolist() == [i for i, r in enumerate(ranks) for _ in range(r)]
    x = torch.randn(2, 3, 5, generator=made)
    with torch.inference_mode(), Operator(layer, stacks) as operator:
        operator.set(torch.tensor(c[: len(ranks)]))
        found = layer(x)
        terms = [w * d["0"].dense() for w, d in zip(c, adapters, strict=False)]
        expected = x @ (layer[0].weight + torch.stack(terms).sum(0)).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_some_modules_lack_takes_nothing_there(tiny_llama: tiny.Tiny) -> None:
    plain, wide = deltas(tiny_llama, "plain"), deltas(tiny_llama, "wide")
    stacks = stacked([plain, wide])
    lonely = sorted(wide.keys() - plain.keys())
    assert lonely
    for name in lonely:
        assert set(stacks[name].owner.tolist()) == {1}


def test_no_coefficients_set_means_the_base_alone(tiny_llama: tiny.Tiny) -> None:
    bare = tiny_llama.model()
    with torch.inference_mode():
        base = logits(bare)
        with Operator(bare, stacked([deltas(tiny_llama, "wide")])):
            assert torch.equal(logits(bare), base)


def hooked(model: nn.Module) -> bool:
    return any(module._forward_hooks for module in model.modules())


def _fails_within(operator: Operator, bare: nn.Module) -> None:
    with operator:
        operator.set(torch.tensor([1.0]))
        assert hooked(bare)
        raise ZeroDivisionError


def test_nothing_stays_after_an_error(tiny_llama: tiny.Tiny) -> None:
    bare = tiny_llama.model()
    operator = Operator(bare, stacked([deltas(tiny_llama, "wide")]))
    with pytest.raises(ZeroDivisionError):
        _fails_within(operator, bare)
    assert not hooked(bare)
    with torch.inference_mode():
        assert torch.equal(logits(bare), logits(tiny_llama.model()))
    # Too few coefficients.
    with pytest.raises(IndexError), operator:
        operator.set(torch.tensor([]))
    assert not hooked(bare)


class Flat(nn.Module):
    """A block that flattens its rows before its second layer, as OPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = self.first(x)
        return self.second(middle.reshape(-1, 4)).view(middle.shape)


def test_a_module_that_does_not_see_rows_apart_says_so() -> None:
    made = torch.Generator().manual_seed(1)
    block = Flat()
    delta = LowRank(torch.randn(2, 4, generator=made), torch.randn(4, 2, generator=made))
    x = torch.randn(2, 3, 4, generator=made)
    with torch.inference_mode(), Operator(block, stacked([{"second": delta}])) as operator:
        operator.set(torch.tensor([1.0]))  # all rows alike: no rows have to be told apart
        together = block(x)
        operator.set(torch.tensor([[[1.0]], [[0.0]]]))
        with pytest.raises(RowsMerged, match=r"second gets its rows as \(6,\), so 2 rows cannot"):
            block(x)
    with torch.inference_mode(), Operator(block, stacked([{"first": delta}])) as operator:
        operator.set(torch.tensor([[[1.0]], [[0.0]]]))
        assert not torch.equal(block(x)[0], together[0])
    assert issubclass(RowsMerged, IncompatibleAdapters)


def test_positions_that_all_rows_share_cannot_differ_by_row(tiny_gpt2: tiny.Tiny) -> None:
    bare = tiny_gpt2.model()
    width = bare.config.n_embd
    positions = LowRank(torch.randn(2, 256), torch.randn(width, 2), "embedding")
    stacks = stacked([{"transformer.wpe": positions}])
    with torch.inference_mode(), Operator(bare, stacks) as operator:
        operator.set(torch.tensor([1.0]))
        close(logits(bare), summed(tiny_gpt2, [{"transformer.wpe": positions}], [1.0]))
        operator.set(torch.tensor([[[1.0]], [[0.0]], [[0.5]]]))
        with pytest.raises(RowsMerged, match="wpe"):
            logits(bare)


class Linear4bit(nn.Module):
    """Weights as whole numbers, read as floats on the way: what quantised layers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        levels = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(levels, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_a_quantised_module_keeps_its_weight_and_gets_its_delta_beside() -> None:
    made = torch.Generator().manual_seed(4)
    layer = nn.Sequential(Linear4bit(nn.Linear(6, 5, bias=False)))
    delta = LowRank(torch.randn(2, 6, generator=made), torch.randn(5, 2, generator=made))
    x, before = torch.randn(2, 3, 6, generator=made), layer[0].weight.clone()
    with torch.inference_mode():
        base = layer(x)
        expected = base + 0.5 * x @ delta.dense().T
        with Operator(layer, stacked([{"0": delta}])) as operator:
            operator.set(torch.tensor([0.5]))
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        with applied(layer, {"0": delta.scaled(0.5)}):
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(x), base)
    assert torch.equal(layer[0].weight, before)


def test_what_it_cannot_sit_on_is_refused_by_name(tiny_llama: tiny.Tiny) -> None:
    model = tiny_llama.model()
    assert list(adaptable(model, ["model.embed_tokens", "lm_head"])) == [
        "lm_head", "model.embed_tokens",
    ]  # fmt: skip
    with pytest.raises(IncompatibleAdapters, match=r"model\.norm is a LlamaRMSNorm in the base"):
        adaptable(model, ["model.norm"])
    with pytest.raises(IncompatibleAdapters, match=r"the base has no module nowhere$"):
        adaptable(model, ["nowhere", "lm_head"])
