"""Rows of many adapters in one pass, against each adapter alone in PEFT, and dense autograd."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.recipes.training import LoraOptions
from lorahub_registry.runtime.grouped import Grouped, Share
from lorahub_registry.runtime.mixture import RowsMerged
from lorahub_registry.train.parameters import Parameters
from tests.train.making import llama

OPTIONS = {
    "lora": {"r": 4},
    "dora": {"r": 3, "use_dora": True},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": ("q_proj", "down_proj")},
    "pissa": {"r": 4, "init_lora_weights": "pissa"},
    "olora": {"r": 2, "init_lora_weights": "olora"},
}


def filled(model, **options):
    """Parameters away from where they start, so that every gradient is there."""
    found = Parameters(model, LoraOptions(**options), seed=1)
    generator = torch.Generator().manual_seed(2)
    found.flat += 0.05 * torch.randn(found.flat.shape, generator=generator)
    return found


def in_peft(model, parameters):
    """The same adapter in stock PEFT, on a copy; a start is taken out of the copy's weights."""
    options, own = parameters.options, copy.deepcopy(model)
    for name, f in parameters.factors.items():
        if f.start is not None:
            own.get_submodule(name).weight -= f.scaling * f.start[1] @ f.start[0]
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        target_modules=list(parameters.factors),
    )
    wrapped = get_peft_model(own, config)
    with torch.no_grad():
        for name, f in parameters.factors.items():
            layer = own.get_submodule(name)
            layer.lora_A["default"].weight.copy_(f.a)
            layer.lora_B["default"].weight.copy_(f.b)
            if f.magnitude is not None:
                layer.lora_magnitude_vector["default"].weight.copy_(f.magnitude)
    return wrapped, own


def test_each_row_gets_what_its_adapter_gives_in_peft_and_so_does_its_gradient():
    model = llama(bias=True)
    adapters = [filled(model, **options) for options in OPTIONS.values()]
    ids = torch.randint(1, 97, (len(adapters) * 2, 7), generator=torch.Generator().manual_seed(3))
    shares = [Share(n, 2 * n, 2 * n + 2) for n in range(len(adapters))]
    with Grouped(model, [a.factors for a in adapters]) as grouped:
        grouped.shares = shares
        logits = model(input_ids=ids).logits
        logits.square().sum().backward()
    for share, parameters in zip(shares, adapters, strict=True):
        wrapped, own = in_peft(model, parameters)
        theirs = wrapped(input_ids=ids[share.start : share.stop]).logits
        theirs.square().sum().backward()
        torch.testing.assert_close(
            logits[share.start : share.stop].detach(), theirs.detach(), rtol=1e-4, atol=1e-5
        )
        for name, f in parameters.factors.items():
            layer = own.get_submodule(name)
            pairs = [
                (f.grad_a, layer.lora_A["default"].weight.grad),
                (f.grad_b, layer.lora_B["default"].weight.grad),
            ]
            if f.grad_magnitude is not None:
                pairs.append((f.grad_magnitude, layer.lora_magnitude_vector["default"].weight.grad))
            for ours, wanted in pairs:
                torch.testing.assert_close(ours, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 3, "use_dora": True}], ids=["lora", "dora"])
def test_dropout_is_seen_by_the_low_rank_part_alone_forward_and_backward(options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    model.requires_grad_(False)
    parameters = filled(model, lora_dropout=0.4, target_modules=("0",), **options)
    (f,) = parameters.factors.values()
    x = torch.randn(2, 3, 6, requires_grad=True)
    with Grouped(model, [parameters.factors]) as grouped:
        grouped.shares = [Share(0, 0, 2, seed=11)]
        mask = grouped.layers[0].mask(grouped.shares[0], f, x).view(x.shape)
        y = model(x)
        y.square().sum().backward()
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.6])
    a, b = (t.clone().requires_grad_() for t in (f.a, f.b))
    other, weight = x.detach().clone().requires_grad_(), model[0].weight
    delta = f.scaling * functional.linear(functional.linear(other * mask, a), b)
    wanted = model[0](other) + delta
    tracked = [a, b]
    if f.magnitude is not None:
        m = f.magnitude.clone().requires_grad_()
        tracked.append(m)
        scale = m / (weight + f.scaling * b @ a).norm(dim=1).detach()
        product = functional.linear(other * mask, weight)
        wanted = model[0](other) + (scale - 1) * product + scale * delta
    torch.testing.assert_close(y.detach(), wanted.detach())
    wanted.square().sum().backward()
    grads = [f.grad_a, f.grad_b, f.grad_magnitude][: len(tracked)]
    for ours, theirs in zip(grads, tracked, strict=True):
        torch.testing.assert_close(ours, theirs.grad)
    torch.testing.assert_close(x.grad, other.grad)


def test_dropout_does_not_change_with_padding_or_neighbours():
    model = llama()
    parameters = filled(model, r=4, lora_dropout=0.5)
    ids = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(4))
    alone, among = [], []
    with Grouped(model, [parameters.factors, parameters.factors]) as grouped:
        grouped.shares = [Share(0, 0, 2, seed=5)]
        alone = model(input_ids=ids).logits
        wide = torch.zeros(5, 9, dtype=torch.long)
        wide[3:, :6] = ids
        grouped.shares = [Share(1, 0, 3, seed=6), Share(0, 3, 5, seed=5)]
        among = model(input_ids=wide).logits[3:, :6]
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-6)


def test_rows_of_nobody_get_the_base_and_the_base_comes_back():
    model = llama()
    ids = torch.randint(1, 97, (3, 5), generator=torch.Generator().manual_seed(4))
    before = model(input_ids=ids).logits
    parameters = filled(model, r=4)
    with pytest.raises(ZeroDivisionError), Grouped(model, [parameters.factors]) as grouped:  # noqa: PT012
        grouped.shares = [Share(0, 0, 1)]
        inside = model(input_ids=ids).logits
        torch.testing.assert_close(inside[1:], before[1:])
        assert not torch.equal(inside[0], before[0])
        raise ZeroDivisionError
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_module_of_the_wrong_kind_or_that_merges_rows_is_refused():
    model = llama()
    parameters = filled(model, r=2, target_modules=("q_proj",))
    factors = next(iter(parameters.factors.values()))
    with pytest.raises(IncompatibleAdapters, match="norm is a LlamaRMSNorm"):
        Grouped(model, [{"model.norm": factors}])
    name = next(iter(parameters.factors))
    with Grouped(model, [{name: factors}]) as grouped:
        grouped.shares = [Share(0, 0, 2)]
        with pytest.raises(RowsMerged, match=r"\(6,\)"):
            model.get_submodule(name)(torch.randn(6, 32))


def test_half_precision_bases_learn_in_float32():
    exact, half = llama(), llama().to(torch.bfloat16)
    ids = torch.randint(1, 97, (4, 6), generator=torch.Generator().manual_seed(4))
    grads = []
    for model in (exact, half):
        adapters = [filled(model, r=4), filled(model, r=4, use_dora=True)]
        with Grouped(model, [a.factors for a in adapters]) as grouped:
            grouped.shares = [Share(0, 0, 2), Share(1, 2, 4)]
            model(input_ids=ids).logits.float().square().sum().backward()
        grads.append(torch.cat([a.grad for a in adapters]))
    assert grads[1].dtype == torch.float32
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.05


def test_conv1d_is_computed_beside_the_module():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)).eval()
    model.requires_grad_(False)
    adapters = [filled(model, r=4), filled(model, r=4, use_dora=True)]
    ids = torch.randint(1, 97, (4, 6), generator=torch.Generator().manual_seed(4))
    with Grouped(model, [a.factors for a in adapters]) as grouped:
        grouped.shares = [Share(0, 0, 2), Share(1, 2, 4)]
        logits = model(input_ids=ids).logits
        logits.square().sum().backward()
    for n, parameters in enumerate(adapters):
        wrapped, own = in_peft(model, parameters)
        theirs = wrapped(input_ids=ids[2 * n : 2 * n + 2]).logits
        torch.testing.assert_close(logits[2 * n : 2 * n + 2], theirs, rtol=1e-4, atol=1e-5)
        theirs.square().sum().backward()
        for name, f in parameters.factors.items():
            wanted = own.get_submodule(name).lora_A["default"].weight.grad
            torch.testing.assert_close(f.grad_a, wanted, rtol=2e-3, atol=1e-4)
