"""Dynamic mixtures as PEFT and transformers load them: what they compute, how they are handled."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters

import lorahub_registry.runtime  # noqa: F401
from lorahub_registry.adapters.dynamic import Arrow, LoraFlow
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, UsageError
from lorahub_registry.runtime.gate_layer import GateLayer
from lorahub_registry.runtime.layers import MixtureLayer
from lorahub_registry.runtime.mixture import Coefficients, RowsMerged
from lorahub_registry.runtime.places import layer_of, place_of
from lorahub_registry.runtime.prompts import mask_of
from lorahub_registry.weights.lowrank import LowRank
from tests.runtime.conftest import Mixture

ROUTERS = ["constant", "layer", "module", "model", "arrow", "prompt", "prompt deeper"]
GATES = ["layer", "module", "model"]
Make = Callable[..., Mixture]

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 9], [1, 77, 8, 90, 13, 200, 3], [1, 5, 6, 7, 8, 9, 10]])
# Of unequal lengths; 0 is padding.
LEFT = torch.tensor([[0, 0, 1, 40, 41, 42], [1, 77, 8, 90, 13, 200], [0, 0, 0, 0, 1, 5]])
RIGHT = torch.tensor([[1, 40, 41, 42, 0, 0], [1, 77, 8, 90, 13, 200], [1, 5, 0, 0, 0, 0]])

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = ids[:, :4]
    return model(input_ids=ids, **more).logits


def tokens(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    """Greedy continuations; padding is masked."""
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": (ids != 0).long(), **more}
    found = model.generate(input_ids=ids, **options)
    return found if model.config.is_encoder_decoder else found[:, ids.shape[1] :]


@contextmanager
def by_hand(model: Any, mixture: Mixture) -> Iterator[None]:
    """Experts and gates of the formula on a bare base, by plain loops in hooks."""
    router, tensors, said, hooks = mixture.router, mixture.tensors, {}, []

    def decide(place: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            said[place] = weights(place, x)

        return hook

    def weights(place: str, x: torch.Tensor) -> torch.Tensor:
        if isinstance(router, Arrow):
            near = (x @ tensors[f"{place}.lora_prototypes"].to(x).T).abs()
            there = tensors[f"{place}.lora_prototypes"].any(-1)
            best = near.masked_fill(~there, -torch.inf).topk(router.top_k, -1)
            shares = (best.values / router.temperature).softmax(-1).nan_to_num(0)
            return torch.zeros_like(near).scatter(-1, best.indices, shares)
        assert isinstance(router, LoraFlow)
        own = x @ tensors[f"{place}.lora_gate"].to(x).T / router.temperature
        return own.softmax(-1) + tensors[f"{place}.lora_gate_bias"].to(x)

    def add(name: str) -> Any:
        layer = layer_of(name, model) or ""
        first = f"{layer.rpartition('.')[0]}.0.mixture"
        place = {"layer": f"{layer}.mixture", "model": first}.get(getattr(router, "per", ""), name)

        def hook(_: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
            x = args[0]
            if hasattr(router, "coefficients"):
                c = torch.tensor(router.coefficients, dtype=x.dtype).expand(*x.shape[:-1], -1)
            else:
                c = said[place] if place.endswith(".mixture") else weights(name, x)
            for e, expert in enumerate(mixture.experts):
                if name in expert:
                    delta = expert[name].b.to(x) @ expert[name].a.to(x)
                    y = y + c[..., e : e + 1] * (x @ delta.T)
            return y

        return hook

    for key in tensors:
        if key.endswith(".mixture.lora_gate"):
            layer = model.get_submodule(key.removesuffix(".mixture.lora_gate"))
            place = key.removesuffix(".lora_gate")
            hooks.append(layer.register_forward_pre_hook(decide(place), with_kwargs=True))
    for name in {name for each in mixture.experts for name in each}:
        hooks.append(model.get_submodule(name).register_forward_hook(add(name)))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["constant", "layer", "module", "model", "arrow"])
@torch.no_grad()
def test_it_is_the_formula_in_float64(mixture: Make, kind: str, base: str) -> None:
    made = mixture(kind, base)
    exact = made.base.model().double()
    with by_hand(exact, made):
        expected = logits(exact)
    found = logits(made.load().double())
    assert not torch.allclose(expected, logits(made.base.model().double()), atol=1e-3)
    # Rounding alone: of sums that are taken in another order, on logits of this size.
    torch.testing.assert_close(
        found, expected, rtol=1e-12, atol=1e-12 * max(1.0, float(expected.abs().max()))
    )


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["prompt", "prompt deeper"])
@torch.no_grad()
def test_prompts_are_routed_by_where_they_lie(mixture: Make, kind: str, base: str) -> None:
    made, seen = mixture(kind, base), {}
    model = made.load()
    with model.base_model.watching(lambda _, module, c: seen.setdefault(module, c)):
        found = logits(model)
    bare = made.base.model()
    reader = bare.get_encoder() if base == "t5" else bare.base_model
    states = reader(input_ids=IDS, output_hidden_states=True).hidden_states
    from lorahub_registry.runtime.nearest import nearest

    [centroids] = made.tensors.values()
    vectors = states[made.router.layer].mean(1)  # type: ignore[union-attr]
    if made.router.layer == 0 and base == "gpt2":  # type: ignore[union-attr]
        vectors = bare.get_input_embeddings()(IDS).mean(1)
    expected = nearest(vectors, centroids, 2, 0.5)
    assert len(seen) == len({n for each in made.experts for n in each})
    for c in seen.values():
        torch.testing.assert_close(c.dense(3)[:, 0], expected, rtol=1e-4, atol=1e-6)
    # Each row has what the constant coefficients of its prompt give it.
    for row in range(3):
        with model.base_model.coefficients(expected[row]):
            alone = logits(model, IDS[row : row + 1])
        torch.testing.assert_close(found[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_the_cache_changes_no_token(mixture: Make, kind: str, base: str) -> None:
    made = mixture(kind, base)
    model = made.load()
    assert torch.equal(tokens(model), tokens(model, use_cache=False))
    if base != "t5":  # whose tiny one repeats itself, whatever stands beside it
        assert not torch.equal(tokens(model), tokens(made.base.model()))


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ROUTERS)
@torch.no_grad()
def test_padding_changes_no_row(mixture: Make, kind: str, base: str) -> None:
    model = mixture(kind, base).load()
    for ids in (LEFT, RIGHT):
        mask = (ids != 0).long()
        more: dict[str, Any] = {"attention_mask": mask}
        if base == "gpt2":
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        if base == "t5" and ids is LEFT:
            continue  # T5 pads to the right; its decoder is tried below
        whole = logits(model, ids, **more)
        for row, keep in enumerate(mask.bool()):
            if base == "t5":
                alone = model(input_ids=ids[row, keep][None], decoder_input_ids=ids[row, None, :4])
                torch.testing.assert_close(whole[row], alone.logits[0], rtol=1e-4, atol=1e-4)
                continue
            alone = logits(model, ids[row, keep][None])[0]
            torch.testing.assert_close(whole[row, keep], alone, rtol=1e-4, atol=1e-4)
    side = RIGHT if base == "t5" else LEFT
    several = tokens(model, side)
    for row in range(3):
        alone = tokens(model, side[row][side[row] != 0][None])
        length = min(alone.shape[1], several.shape[1])
        assert torch.equal(several[row, :length], alone[0, :length])


@pytest.mark.parametrize("kind", ROUTERS)
@torch.no_grad()
def test_a_half_precision_base_keeps_float32_experts(mixture: Make, kind: str) -> None:
    made = mixture(kind)
    wide = logits(made.load())
    for load in ("peft", "peft low", "transformers"):
        base = made.base.model().bfloat16()
        if load == "transformers":
            base.load_adapter(str(made.folder))
            model = base.eval()
        else:
            model = made.load(base, low_cpu_mem_usage=load == "peft low")
        ours = [p for n, p in model.named_parameters() if "lora_" in n]
        assert {p.dtype for p in ours} == {torch.float32}, load
        found = logits(model)
        assert found.dtype == torch.bfloat16
        if kind.startswith("prompt"):  # rounding may send a prompt elsewhere
            continue
        bare = logits(made.base.model().bfloat16()).float()
        assert float((found.float() - wide).std()) < 0.5 * float((bare - wide).std())
    # Only PEFT's model knows which tokens are the prompt where no cache does.
    model = made.load(made.base.model().bfloat16())
    assert torch.equal(tokens(model), tokens(model, use_cache=False))


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ROUTERS)
@torch.no_grad()
def test_every_way_of_loading_gives_the_same(
    mixture: Make, kind: str, base: str, tmp_path: Any
) -> None:
    made = mixture(kind, base)
    model = made.load()
    expected = logits(model)
    assert torch.equal(logits(made.load(low_cpu_mem_usage=True)), expected)
    assert torch.equal(logits(made.load(adapter_name="other.one".replace(".", "_"))), expected)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(made.base.model(), str(tmp_path / "again")).eval()
    assert torch.equal(logits(again), expected)
    bare = made.base.model()
    bare.load_adapter(str(made.folder))
    assert torch.equal(logits(bare.eval()), expected)
    whole = copy.deepcopy(model)
    assert torch.equal(logits(whole), expected)


@pytest.mark.parametrize("kind", ROUTERS)
@torch.no_grad()
def test_two_mixtures_of_one_model(mixture: Make, kind: str) -> None:
    first, second = mixture(kind), mixture("layer", seed=9)
    alone = logits(second.load())
    model = first.load(adapter_name="one")
    bare, own = logits(first.base.model()), logits(model)
    model.load_adapter(str(second.folder), adapter_name="two")
    assert torch.equal(logits(model), own)
    model.set_adapter("two")
    assert torch.equal(logits(model), alone)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    mixed = logits(model, adapter_names=["one", "__base__", "two"])
    for row, expected in enumerate((own, bare, alone)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-4)
    assert torch.equal(logits(model), alone)
    model.delete_adapter("one")
    assert torch.equal(logits(model), alone)
    assert not [n for n in model.state_dict() if ".one" in n]
    base = model.unload()
    assert torch.equal(logits(base), bare)
    assert not [m for m in base.modules() if m._forward_pre_hooks]
    assert not [n for n, _ in base.named_parameters() if "lora_" in n]


@torch.no_grad()
def test_transformers_handles_two_mixtures(mixture: Make) -> None:
    first, second = mixture("prompt"), mixture("layer")
    model = first.base.model()
    bare = logits(model)
    model.load_adapter(str(first.folder), adapter_name="one")
    model.load_adapter(str(second.folder), adapter_name="two")
    model.set_adapter("one")
    torch.testing.assert_close(logits(model), logits(first.load()))
    model.set_adapter("two")
    torch.testing.assert_close(logits(model), logits(second.load()))
    model.disable_adapters()
    assert torch.equal(logits(model), bare)
    model.enable_adapters()
    model.delete_adapter("one")
    assert torch.equal(logits(model), logits(second.load()))
    model.delete_adapter("two")
    assert torch.equal(logits(model), bare)
    assert not [m for m in model.modules() if m._forward_pre_hooks]
    model.load_adapter(str(second.folder), adapter_name="two")
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(second.load()))


@pytest.mark.parametrize("base", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_a_batch_with_their_own_mixture_generate(
    mixture: Make, base: str, beams: int
) -> None:
    kinds = ["constant", "layer", "prompt"]
    made = [mixture(kind, base) for kind in kinds]
    model = made[0].load(adapter_name="constant")
    for one, kind in list(zip(made, kinds, strict=True))[1:]:
        model.load_adapter(str(one.folder), adapter_name=kind)
    more = {"num_beams": beams, "min_new_tokens": 8}
    found = tokens(model, adapter_names=kinds, **more)
    for row, one in enumerate(made):
        assert torch.equal(found[row], tokens(one.load(), IDS[row : row + 1], **more)[0])


@torch.no_grad()
def test_given_coefficients_take_the_routers_place(mixture: Make) -> None:
    made = mixture("layer")
    model, bare = made.load(), logits(made.base.model())
    own = logits(model)
    each = torch.tensor([[0.5, 0.0, 1.0], [0.0, 0.0, 0.0], [-1.0, 0.25, 0.0]])
    with model.base_model.coefficients(each[:, None]):
        found = logits(model)
        beams = tokens(model, num_beams=2, min_new_tokens=8)
    torch.testing.assert_close(found[1], bare[1])
    for row in range(3):
        with model.base_model.coefficients(each[row]):
            alone = logits(model, IDS[row : row + 1])
            assert torch.equal(
                tokens(model, IDS[row : row + 1], num_beams=2, min_new_tokens=8)[0], beams[row]
            )
        torch.testing.assert_close(found[row], alone[0], rtol=1e-5, atol=1e-4)
    one_hot = Coefficients(torch.ones(3, 1, 1), torch.tensor([2, 0, 1]).view(3, 1, 1))
    with model.base_model.coefficients(one_hot):
        chosen = logits(model)
    for row, expert in enumerate([2, 0, 1]):
        with model.base_model.coefficients(torch.eye(3)[expert]):
            alone = logits(model, IDS[row : row + 1])
        torch.testing.assert_close(chosen[row], alone[0], rtol=1e-5, atol=1e-4)
    with model.base_model.coefficients([0.0, 1.0, 0.0]):
        listed = logits(model, IDS[1:2])
    with model.base_model.coefficients(torch.eye(3)[1]):
        assert torch.equal(logits(model, IDS[1:2]), listed)
    assert torch.equal(logits(model), own)


@torch.no_grad()
@pytest.mark.parametrize("base", ["gpt2", "t5"])
def test_each_row_has_its_line_in_other_bases_too(mixture: Make, base: str) -> None:
    model = mixture("layer", base).load()
    each = torch.tensor([[0.5, 0.0, 1.0], [0.0, 0.0, 0.0], [-1.0, 0.25, 0.0]])
    more = {"decoder_input_ids": IDS[:, :3]} if base == "t5" else {}
    embedded = model.get_input_embeddings()(IDS)
    with model.base_model.coefficients(each[:, None]):
        found = model(input_ids=IDS, **more).logits
        same = model(inputs_embeds=embedded, **more).logits
    torch.testing.assert_close(same, found, rtol=1e-5, atol=1e-4)
    for row in range(3):
        own = {name: ids[row : row + 1] for name, ids in more.items()}
        with model.base_model.coefficients(each[row]):
            alone = model(input_ids=IDS[row : row + 1], **own).logits
        torch.testing.assert_close(found[row], alone[0], rtol=1e-5, atol=1e-4)
    with (
        model.base_model.coefficients(each[:2, None]),
        pytest.raises(UsageError, match="coefficients for 2 rows, and a batch of 3"),
    ):
        model(input_ids=IDS, **more)


@torch.no_grad()
@pytest.mark.parametrize(
    ("c", "said"),
    [
        (torch.ones(1), "of shape [1] for 3 experts"),
        (torch.ones(4), "of shape [4] for 3 experts"),
        (torch.ones(3, 3), "of shape [3, 3] for 3 experts"),
        (torch.ones(3, 1, 1), "of shape [3, 1, 1] for 3 experts"),
        (torch.ones(3, dtype=torch.int64), "must be floating point, and these are torch.int64"),
        (torch.tensor([1, torch.nan, 0]), "no finite numbers"),
        ([1, 0, 0], "must be floating point"),
        ([1.0, 0.5], "of shape [2] for 3 experts"),
        (["a", "b", "c"], "coefficients that are no numbers"),
        (None, "coefficients that are no numbers"),
        (torch.ones(2, 1, 3), "coefficients for 2 rows, and a batch of 3"),
        (torch.ones(1, 1, 3), "coefficients for 1 rows, and a batch of 3"),
        (Coefficients(torch.ones(3, 1, 1), torch.full((3, 1, 1), 3)), "not among 0 to 2"),
        (Coefficients(torch.ones(3, 1, 1), torch.full((3, 1, 1), -1)), "not among 0 to 2"),
        (Coefficients(torch.ones(3, 1, 1), torch.zeros(3, 1, 2).long()), "which says [3, 1, 2]"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(mixture: Make, c: Any, said: str) -> None:
    model = mixture("layer").load()
    expected = logits(model)
    with pytest.raises(UsageError) as caught, model.base_model.coefficients(c):
        logits(model)
    assert said in str(caught.value)
    with pytest.raises(UsageError, match="no mixture is called ghost"):
        model.base_model.coefficients(torch.ones(3), "ghost").__enter__()
    assert torch.equal(logits(model), expected)
    # One row of as many tokens as rows have coefficients is a batch of one.
    with pytest.raises(UsageError), model.base_model.coefficients(torch.ones(7, 1, 3)):
        logits(model, IDS[:1])


class Choosing(nn.Module):
    """A layer whose experts get the tokens that are theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 32)
        out, first = torch.zeros_like(flat), flat[:, 0] > 0
        for expert, chosen in zip(self.experts, (first, ~first), strict=True):
            out[chosen] = expert(flat[chosen])
        return out.view_as(x)


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_layers_experts_have_no_rows(mixture: Make, tiny_llama: Any, kind: str) -> None:
    def sparse() -> Any:
        torch.manual_seed(0)
        model = tiny_llama.model()
        for layer in model.model.layers:
            layer.mlp = Choosing()
        return model

    name = "model.layers.1.mlp.experts.1"
    one = {name: LowRank(torch.randn(2, 32), torch.randn(32, 2))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.runtime.conftest.experts_on", lambda _: [one, one, one])
        patch.setattr("tests.runtime.conftest.place_of", lambda *_: "model.layers.1")
        made = mixture(kind)
    if kind in {"layer", "model", "prompt", "prompt deeper"}:
        base = sparse()
        with pytest.raises(IncompatibleAdapters, match="is in an expert of its layer"):
            made.load(base)
        assert not [n for n, _ in base.named_modules() if "lora_" in n]
        return
    model = made.load(sparse())
    whole = logits(model)
    for row in range(3):
        torch.testing.assert_close(whole[row], logits(model, IDS[row : row + 1])[0])
    with (
        pytest.raises(RowsMerged, match="rows cannot be told apart"),
        model.base_model.coefficients(torch.ones(3, 1, 3)),
    ):
        logits(model)
    if kind == "constant":
        with pytest.raises(RowsMerged, match="rows cannot be told apart"):
            logits(model, adapter_names=["default", "__base__", "default"])


@pytest.mark.parametrize(
    ("name", "crosses"),
    [
        ("decoder.block.0.layer.1.EncDecAttention.k", True),
        ("model.decoder.layers.0.encoder_attn.v_proj", True),
        ("model.layers.0.cross_attn.k_proj", True),
        ("bert.encoder.layer.0.crossattention.self.key", True),
        ("transformer.h.0.crossattention.c_attn", True),
        ("transformer.h.0.crossattention.q_attn", False),
        ("bert.encoder.layer.0.crossattention.output.dense", False),
        ("model.layers.0.cross_attn.q_proj", False),
        ("model.layers.0.self_attn.k_proj", False),
        ("transformer.h.0.attn.c_attn", False),
    ],
)
def test_what_sees_another_sequence_is_known_by_name(name: str, crosses: bool) -> None:
    model, parts = nn.Module(), name.split(".")
    at = model
    for i, part in enumerate(parts):
        listed = i + 1 < len(parts) and parts[i + 1].isdigit()
        at.add_module(part, nn.ModuleList() if listed else nn.Module())
        at = getattr(at, part)
    if crosses:
        with pytest.raises(IncompatibleAdapters, match="sees the encoder's tokens"):
            place_of(name, LoraFlow(), model)
    else:
        assert place_of(name, LoraFlow(), model) == layer_of(name, model)


def test_merging_is_refused_with_the_reason(mixture: Make) -> None:
    model = mixture("layer").load()
    layer = next(m for m in model.modules() if isinstance(m, MixtureLayer))
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(ValueError, match="depend on the tokens"):
            merge()
    with warnings.catch_warnings():
        assert torch.isfinite(logits(model)).all()


def test_an_exception_in_the_forward_leaves_nothing(mixture: Make) -> None:
    made = mixture("prompt deeper")
    model = made.load()
    model.load_adapter(str(mixture("layer").folder), adapter_name="two")
    expected, hooks = logits(model), [dict(m._forward_pre_hooks) for m in model.modules()]
    flow = model.base_model._flow
    broken = model.base_model.model.model.layers[1].mlp

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for blocks in (
        {}, {"adapter_names": ["two", "__base__", "default"]},
    ):  # fmt: skip
        handle = broken.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt), model.base_model.coefficients(torch.ones(3)):
            logits(model, **blocks)
        model.set_adapter("two")
        with pytest.raises(ZeroDivisionError), model.base_model.watching(lambda *_: 1 / 0):
            logits(model)
        model.set_adapter("default")
        handle.remove()
        assert (flow.names, flow.given, flow.watched, flow.silent) == (None, {}, None, False)
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(logits(model), expected)


def test_names_that_fit_no_batch_are_refused(mixture: Make) -> None:
    model = mixture("layer").load()
    with pytest.raises(ValueError, match="no adapter is called ghost"):
        logits(model, adapter_names=["ghost", "default", "default"])
    with pytest.raises(IncompatibleAdapters, match="2 names for a batch of 3"):
        logits(model, adapter_names=["default", "default"])


@pytest.mark.parametrize("kind", GATES)
def test_only_gates_train(mixture: Make, kind: str) -> None:
    model = mixture(kind).load(is_trainable=True)

    def trains() -> set[str]:
        return {
            n.split(".lora_")[1].split(".")[0]
            for n, p in model.named_parameters()
            if p.requires_grad
        }

    assert trains() == {"gate", "gate_bias"}
    model.set_adapter("default")
    assert trains() == {"gate", "gate_bias"}
    model.load_adapter(str(mixture(kind).folder), adapter_name="two", is_trainable=True)
    model.set_adapter("two")
    assert trains() == {"gate", "gate_bias"}
    assert all(".two" in n for n, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    assert trains() == {"gate", "gate_bias"}
    logits(model).square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (
            "lora_gate" in name and ".default" in name
        ), name


@pytest.mark.parametrize("kind", ["constant", "arrow", "prompt"])
def test_experts_prototypes_and_centroids_never_train(mixture: Make, kind: str) -> None:
    model = mixture(kind).load(is_trainable=True)
    model.set_adapter("default")
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", GATES)
def test_a_second_mixture_leaves_the_first_one_training(mixture: Make, kind: str) -> None:
    model = mixture(kind).load(is_trainable=True)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_adapter(str(mixture("module").folder), adapter_name="two", is_trainable=True)
    now = {n for n, p in model.named_parameters() if p.requires_grad}
    assert before <= now
    assert all("lora_gate" in name for name in now)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_or_is_refused(
    mixture: Make, kind: str, reentrant: bool
) -> None:
    made = mixture(kind)

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = made.load(is_trainable=True)
        if checkpointing:
            how = {"use_reentrant": reentrant}
            model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            model.enable_input_require_grads()
        model.train()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    if kind in {"layer", "model"} and reentrant:
        with pytest.raises(IncompatibleAdapters, match="reentrant") as caught:
            gradients(True)
        assert "use_reentrant" in (caught.value.hint or "")
        return
    found, expected = gradients(True), gradients(False)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert bool(value.any())
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", GATES)
def test_two_forwards_before_a_backward_are_right_or_refused(mixture: Make, kind: str) -> None:
    made, (one, two, _) = mixture(kind), IDS.split(1)

    def gradients(checkpointing: bool, order: str) -> dict[str, torch.Tensor]:
        model = made.load(is_trainable=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first = model(input_ids=one, labels=one).loss
        if order == "in turn":
            first.backward(retain_graph=True)
            first.mul(0.5).backward()
            with torch.no_grad():
                model(input_ids=two)
        second = model(input_ids=two, labels=two).loss
        if order == "forgotten":
            del first
            second.backward()
        elif order == "in turn":
            second.backward()
        else:
            (first - second).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    for order in ("in turn", "forgotten", "together"):
        if kind != "module" and order == "together":
            with pytest.raises(IncompatibleAdapters, match="decided for another batch") as caught:
                gradients(True, order)
            assert "backward after each forward" in (caught.value.hint or "")
            continue
        found, expected = gradients(True, order), gradients(False, order)
        for name, value in expected.items():
            assert bool(value.any())
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["layer", "model"])
def test_an_evaluation_before_the_backward_is_refused_with_checkpointing(
    mixture: Make, kind: str
) -> None:
    model = mixture(kind).load(is_trainable=True).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        model(input_ids=IDS.flip(1))
    with pytest.raises(IncompatibleAdapters, match="decided for another batch"):
        loss.backward()


@pytest.mark.parametrize("kind", ["layer", "model"])
def test_checkpointing_an_encoder_and_a_decoder(mixture: Make, kind: str) -> None:
    made = mixture(kind, "t5")

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = made.load(is_trainable=True).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS[:, :5].contiguous(), use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    found, expected = gradients(True), gradients(False)
    for name, value in expected.items():
        assert bool(value.any())
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def routed(model: Any, **call: Any) -> tuple[list[int], Any]:
    """(Which expert each row of the call had, what the call gave)."""
    seen: list[list[int]] = []

    def watch(_: str, __: str, c: Coefficients) -> None:
        seen.append(c.dense(3)[:, 0].argmax(-1).tolist())

    with torch.no_grad(), model.base_model.watching(watch):
        out = model(**call)
    assert all(one == seen[0] for one in seen)
    return seen[0], out


def differing(model: Any, prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts that are routed to different experts."""
    first = routed(model, input_ids=prompts[0])[0]
    return prompts[0], next(p for p in prompts if routed(model, input_ids=p)[0] != first)


def test_each_prompt_is_routed_anew(mixture: Make) -> None:
    """Also one that only adds a token to the last, and whichever router is asked between."""
    model, alone = mixture("prompt").load(), mixture("prompt").load()
    model.load_adapter(str(mixture("prompt", seed=11).folder), adapter_name="two")
    start, changed = torch.tensor([[1, 40, 41]]), 0
    before, _ = routed(model, input_ids=start)
    for last in range(3, 250, 5):
        longer = torch.tensor([[1, 40, 41, last]])
        model.set_adapter("two")
        routed(model, input_ids=start)
        model.set_adapter("default")
        routed(model, input_ids=start)
        found, _ = routed(model, input_ids=longer)
        alone.base_model._flow.decided.clear()
        assert found == routed(alone, input_ids=longer)[0]
        changed += found != before
    assert changed


def test_a_cache_keeps_what_its_prompt_was_routed_to(mixture: Make) -> None:
    model = mixture("prompt").load()
    one, other = differing(model, [torch.tensor([[1, i, i + 1]]) for i in range(3, 200)])
    chosen, first = routed(model, input_ids=one, use_cache=True)
    others, second = routed(model, input_ids=other, use_cache=True, return_dict=False)
    assert chosen != others
    step, cache = torch.tensor([[50]]), first.past_key_values
    for _ in range(2):
        assert routed(model, input_ids=step, past_key_values=cache)[0] == chosen
        assert routed(model, input_ids=step, past_key_values=second[1])[0] == others
    with pytest.raises(IncompatibleAdapters, match="was not begun with mixture 'default'"):
        model(input_ids=step, past_key_values=copy.deepcopy(cache))
    # And a conversation goes on with the expert that it began with.
    longer = torch.cat([one, step, step, other], 1)
    with model.base_model.watching(lambda _, __, c: seen.add(int(c.dense(3)[0, 0].argmax()))):
        seen: set[int] = set()
        model.generate(input_ids=longer, past_key_values=cache, max_new_tokens=3)
    assert [seen] == [set(chosen)]


def test_generating_reads_the_prompt_and_nothing_after_it(mixture: Make) -> None:
    model = mixture("prompt").load()
    ways: list[dict[str, Any]] = [
        {}, {"use_cache": False}, {"cache_implementation": "static"},
        {"num_beams": 2}, {"prompt_lookup_num_tokens": 2},
    ]  # fmt: skip
    for way in ways:
        ids = torch.tensor([[1, 5, 6, 5, 6]]) if "prompt_lookup_num_tokens" in way else LEFT
        seen: list[torch.Tensor] = []

        def watch(_: str, __: str, c: Coefficients, seen: list[torch.Tensor] = seen) -> None:
            seen.append(c.dense(3)[:, 0])

        with model.base_model.watching(watch):
            model(input_ids=ids, attention_mask=(ids != 0).long())
            expected = seen[0].repeat_interleave(way.get("num_beams", 1), 0)
            seen.clear()
            tokens(model, ids, min_new_tokens=8, **way)
        for one in seen:
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(IncompatibleAdapters, match="reads prompts whole, and of 6 tokens"):
        tokens(model, LEFT, prefill_chunk_size=2)


@torch.no_grad()
def test_static_caches_masks_are_read(mixture: Make) -> None:
    model = mixture("prompt deeper").load()
    found = tokens(model, LEFT, cache_implementation="static")
    for row in range(3):
        alone = tokens(model, LEFT[row][LEFT[row] != 0][None])
        assert torch.equal(found[row], alone[0])


def test_masks_that_tell_no_padding_are_refused(mixture: Make) -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    causal = torch.ones(2, 1, 3, 5, dtype=torch.bool).tril()
    causal[1, :, :, 0] = False
    expected = torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert torch.equal(mask_of(causal, ids), expected)  # type: ignore[arg-type]
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert torch.equal(mask_of(added, ids), expected)  # type: ignore[arg-type]
    assert mask_of(None, ids) is None
    for wrong in ({"full_attention": causal}, causal[:, :, -1:], causal[0]):
        with pytest.raises(IncompatibleAdapters, match="cannot tell prompts from padding"):
            mask_of(wrong, ids)


def test_an_evaluation_between_steps_blinds_no_gate(mixture: Make) -> None:
    model = mixture("model").load(is_trainable=True)
    with torch.inference_mode():
        logits(model)
    logits(model).mean().backward()
    assert model.base_model.model.model.layers[0].mixture.lora_gate["default"].grad.any()


def test_gates_learn(mixture: Make) -> None:
    model = mixture("layer").load(is_trainable=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "aot_eager") for kind in ("layer", "module", "model")),
        *((kind, "eager") for kind in ("arrow", "prompt")),
    ],
)
@torch.no_grad()
def test_compiled_it_gives_the_same(mixture: Make, kind: str, backend: str) -> None:
    model = mixture(kind).load()
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        compiled(input_ids=IDS.flip(0)).logits, expected.flip(0), rtol=1e-4, atol=1e-4
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["layer", "arrow"])
@torch.no_grad()
def test_no_graph_is_made_for_each_module_by_its_name(mixture: Make, kind: str) -> None:
    model = mixture(kind).load()  # and nothing is kept from a run before
    torch._dynamo.reset()
    counters.clear()
    found = torch.compile(model, backend="eager")(input_ids=IDS).logits
    breaks = sum(counters["graph_break"].values())
    graphs = _debug_get_cache_entry_list(MixtureLayer._experts.__code__)
    torch._dynamo.reset()
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)
    if kind == "layer":
        assert breaks == 0
    else:  # the few experts that speak are computed outside
        assert breaks > 0
        assert len(graphs) <= 1


@pytest.mark.parametrize("kind", ["layer"])
def test_compiled_gates_get_the_same_gradients(mixture: Make, kind: str) -> None:
    model = mixture(kind).load(is_trainable=True)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    logits(model).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in named.items()}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager")(input_ids=IDS).logits.square().mean().backward()
    for name, p in named.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["layer", "model", "prompt"])
def test_a_copy_is_its_own(mixture: Make, kind: str) -> None:
    model = mixture(kind).load(is_trainable=True)
    logits(model).mean()  # what was decided hangs on a graph, which nothing can copy
    other = copy.deepcopy(model)
    flows = [{id(m.flow) for m in it.modules() if hasattr(m, "flow")} for it in (model, other)]
    assert [len(f) for f in flows] == [1, 1]
    assert flows[0].isdisjoint(flows[1])
    assert other.base_model._flow is next(m.flow for m in other.modules() if hasattr(m, "flow"))
    with torch.no_grad():
        expected = logits(model)
        for p in other.parameters():
            p.mul_(0.5)
        assert torch.equal(logits(model), expected)
        assert not torch.equal(logits(other), expected)
    base = other.unload()
    assert not [m for m in base.modules() if m._forward_pre_hooks]
    assert torch.equal(logits(model), expected)


def test_a_gate_has_no_base_layer_to_find(mixture: Make) -> None:
    model = mixture("layer").load()
    gates = [m for m in model.modules() if isinstance(m, GateLayer)]
    assert len(gates) == 2
    for held in gates:
        assert not hasattr(held, "weight")
        assert not hasattr(held, "bias")
    names = [n for n, _ in model.named_parameters()]
    assert len(names) == len(set(names))
    assert len({id(p) for p in model.parameters()}) == len(names)


@torch.no_grad()
def test_calling_a_part_says_what_to_do(mixture: Make) -> None:
    model = mixture("layer").load()
    with pytest.raises(IncompatibleAdapters, match="called before") as caught:
        model.base_model.model.model.layers[0].self_attn.q_proj(torch.ones(1, 2, 32))
    assert caught.value.hint


@torch.no_grad()
def test_embeddings_have_no_prompt_to_route_by(mixture: Make) -> None:
    model = mixture("prompt").load()
    embedded = model.get_input_embeddings()(IDS)
    with pytest.raises(IncompatibleAdapters, match="reads token ids"):
        model(inputs_embeds=embedded)
    with model.base_model.coefficients(torch.ones(3)):
        model(inputs_embeds=embedded)


def test_an_encoders_tokens_are_not_the_decoders(mixture: Make, tiny_t5: Any) -> None:
    from tests.compose.making import deltas

    with pytest.MonkeyPatch.context() as patch:
        whole = deltas(tiny_t5, "t5")
        assert any("EncDecAttention.v" in name for name in whole)
        patch.setattr("tests.runtime.conftest.experts_on", lambda _: [whole, whole, whole])
        for kind in ("module", "arrow", "prompt", "constant"):
            assert torch.isfinite(logits(mixture(kind, "t5").load())).all()
        patch.setattr("tests.runtime.conftest.place_of", lambda name, *_: name.split(".l")[0])
        with pytest.raises(IncompatibleAdapters, match=r"EncDecAttention\.v sees the encoder's"):
            mixture("layer", "t5").load()


def test_a_load_that_fails_leaves_the_base_alone(mixture: Make) -> None:
    made = mixture("layer")
    config = json.loads((made.folder / "adapter_config.json").read_text())
    config["target_modules"] = [*config["target_modules"], "embed_tokens"]
    (made.folder / "adapter_config.json").write_text(json.dumps(config))
    base = made.base.model()
    names = [n for n, _ in base.named_modules()]
    with pytest.raises(IncompatibleAdapters, match="embed_tokens is a Embedding"):
        made.load(base)
    assert [n for n, _ in base.named_modules()] == names
    assert not [m for m in base.modules() if m._forward_pre_hooks]


def test_the_type_is_one_of_pefts() -> None:
    kind = PeftType("LORA_MIXTURE")
    assert kind is PeftType.LORA_MIXTURE  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert json.loads(json.dumps(kind)) == "LORA_MIXTURE" == kind.value
    assert kind in list(PeftType)
    assert sys.modules["peft"] is peft


def test_only_one_part_of_a_key_is_loras(mixture: Make) -> None:
    """What transformers takes for an adapter's name stands behind the one ``lora_`` part."""
    for kind in ROUTERS:
        model = mixture(kind).load()
        for key in peft.get_peft_model_state_dict(model):
            assert sum(part.startswith("lora_") for part in key.split(".")) == 1


def test_a_quantised_base(mixture: Make) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for kind in ROUTERS:
        made = mixture(kind)
        base = made.base.model()
        for name, module in list(base.named_modules()):
            if isinstance(module, nn.Linear) and "lm_head" not in name:
                small = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, quant_type="nf4"
                )
                small.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False)
                base.set_submodule(name, small.to("cpu"))
        bare = logits(base)
        model = made.load(base)
        found = logits(model)
        assert torch.isfinite(found).all()
        assert float((found - bare).abs().max()) > 0.1
        assert torch.equal(tokens(model), tokens(model, use_cache=False))


def test_on_a_base_with_other_adapters_it_is_refused(mixture: Make, tiny_llama: Any) -> None:
    base = tiny_llama.model()
    other = PeftModel.from_pretrained(base, str(tiny_llama.adapter("plain"))).eval()
    before = logits(other)
    with pytest.raises(IncompatibleAdapters, match="adapters of another PEFT type"):
        PeftModel.from_pretrained(base, str(mixture("layer").folder))
    assert torch.equal(logits(other), before)
    assert set(other.peft_config) == {"default"}
    assert other.peft_config["default"].peft_type == "LORA"


@pytest.mark.parametrize("wrong", ["lora_gate", "lora_A", "NaN"])
def test_transformers_own_loading_is_checked_at_the_first_forward(wrong, mixture):
    made = mixture("module")
    path = made.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if (wrong if wrong == "lora_A" else "lora_gate") in n)
    tensors[name] = tensors[name] * float("nan") if wrong == "NaN" else tensors[name] + 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    base, ids = made.base.model(), torch.arange(3, 9)[None]
    plain = base(ids).logits
    base.load_adapter(str(made.folder))
    for model in (copy.deepcopy(base), base):
        with pytest.raises(BrokenAdapter):
            model(ids)
        assert torch.equal(model(ids).logits, plain)


def test_what_is_whole_is_checked_once(mixture):
    made, ids = mixture("module"), torch.arange(3, 9)[None]
    base = made.base.model()
    hooks = len(base._forward_pre_hooks)
    base.load_adapter(str(made.folder))
    twin = copy.deepcopy(base)
    wanted = made.load()(ids).logits
    for model in (base, twin):
        assert len(model._forward_pre_hooks) == hooks + 1
        torch.testing.assert_close(model(ids).logits, wanted)
        assert len(model._forward_pre_hooks) == hooks


@torch.no_grad()
def test_prompts_that_do_not_cover_a_batch_are_refused(mixture: Make) -> None:
    model = mixture("prompt").load()
    read = torch.ones_like(IDS)
    with model.base_model.reading(read):
        expected = logits(model)
    for wrong in (read[:, :-1], read[:2], read[0], read.tolist()):
        with (
            pytest.raises(UsageError, match="reading was given") as caught,
            model.base_model.reading(wrong),
        ):
            logits(model)
        assert f"give a tensor {list(IDS.shape)}" in str(caught.value.hint)
    with model.base_model.reading(read[:1]):
        assert torch.equal(logits(model), expected)
