"""MixLoRA made of adapters: their feed-forward parts as experts, and trained routers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.adapters.mixlora import TopK
from lorahub_registry.compose.encoder import Rows
from lorahub_registry.compose.expert_facts import ExpertRouter, observed
from lorahub_registry.compose.expert_parts import Parts, take_apart, tensors_of
from lorahub_registry.compose.experts import MoeStanding, train_routers
from lorahub_registry.compose.run import compose
from lorahub_registry.errors import IncompatibleAdapters, NotApplied
from lorahub_registry.evaluate.stock import stock_peft, unload
from lorahub_registry.recipes.mixlora import MixLora
from lorahub_registry.runtime.grouped import Share
from lorahub_registry.runtime.moe import router_losses
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import Deltas, LowRank, weighted_sum
from lorahub_registry.weights.mixlora import write_mixlora
from tests import tiny
from tests.compose.dynamic import Made, logits, mix, of_folder
from tests.compose.making import deltas, encoded, member, recipe, rows

# "plain" sits on the attention alone; the others' ranks and targets differ.
FOUR = ("plain", "wide", "rslora", "patterns")
SHORT = {"max_steps": 3, "batch_size": 4}
MODEL = "learned static coefficients (per model)"
LAYER = "learned static coefficients (per layer)"


@pytest.fixture(scope="module")
def made(tiny_llama: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Four adapters, of which one has no feed-forward part."""
    method = {"type": "mixlora", "attention": "learn", "training": SHORT}
    return mix(tiny_llama, tmp_path_factory.mktemp("experts") / "out", method, FOUR)


def parts_of(model: tiny.Tiny, kinds: Sequence[str], *, k: int = 2, **method: Any) -> Parts:
    """Adapters of these kinds, taken apart, for a router that chooses ``k``."""
    wanted = MixLora.model_validate(method)
    given = [1 / len(kinds)] * len(kinds)
    if wanted.attention != "average":
        given = [float(i == kinds.index(wanted.attention)) for i in range(len(kinds))]
    adapters = {f"{i}-{kind}": deltas(model, kind) for i, kind in enumerate(kinds)}
    parts = take_apart(
        wanted,
        adapters,
        given,
        model.base().model,
        base=model.name,
        base_revision=None,
        task_type="CAUSAL_LM",
    )
    return replace(parts, mix=replace(parts.mix, routing=TopK(k)))


def two_of(number: int, out_of: int, width: int = 32) -> torch.Tensor:
    """A router that chooses experts ``number`` and ``number + 1`` for all tokens, half of them
    each, and never another: it is above zero for one of the two."""
    gate = torch.zeros(out_of, width)
    gate[number] = torch.randn(width, generator=torch.Generator().manual_seed(3))
    gate[number + 1] = -gate[number]
    return gate


def written(
    model: tiny.Tiny, folder: Path, parts: Parts, gate: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """An untrained MixLoRA, with this router in every layer."""
    folder.mkdir(parents=True)
    tensors = tensors_of(parts, model.model(), dtype="float32", seed=0, trains=False)
    if gate is not None:
        tensors |= {name: gate for name in tensors if name.endswith("moe_gate.weight")}
    write_mixlora(folder, parts.mix, tensors)
    return tensors


def alone(model: tiny.Tiny, kind: str) -> torch.Tensor:
    """What stock PEFT computes with one adapter."""
    return logits(PeftModel.from_pretrained(model.model(), str(model.adapter(kind))).eval())


@pytest.mark.parametrize("kind", ["wide", "patterns"])
def test_what_one_adapter_gets_all_of_is_that_adapter(
    kind: str, tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    # Twice in a row, as no linear router is above zero for every token.
    parts = parts_of(tiny_llama, ["rslora", kind, kind], k=1, attention=kind)
    written(tiny_llama, tmp_path / "one", parts, two_of(1, 3))
    found = of_folder(tiny_llama, tmp_path / "one")
    torch.testing.assert_close(found, alone(tiny_llama, kind), rtol=0, atol=1e-5)
    written(tiny_llama, tmp_path / "other", parts, two_of(0, 3))
    other = of_folder(tiny_llama, tmp_path / "other")
    assert (other - found).abs().max() > 1e-2, "who is chosen makes the difference"


def copies(model: tiny.Tiny, kind: str, place: Path, **method: Any) -> Made:
    """A mixture of one adapter with itself."""
    names, out = ("one", "two", "three"), place / "out"
    for name in names:
        shutil.copytree(model.adapter(kind), place / name)
    out.mkdir()
    wanted = recipe(
        {"type": "mixlora", **method}, [{"ref": f"./{n}", "name": n} for n in names]
    )  # fmt: skip
    members = [member(place / name) for name in names]
    base = replace(model.base(), revision="c0ffee")
    return Made(wanted, compose(wanted, members, base, Rows(rows(6), rows(10)[6:]), out), out, base)


@pytest.mark.parametrize(("model", "kind"), [("tiny_llama", "wide"), ("tiny_gpt2", "gpt2")])
def test_whoever_is_chosen_among_copies_of_an_adapter_it_is_that_adapter(
    model: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base: tiny.Tiny = request.getfixturevalue(model)
    done = copies(base, kind, tmp_path, training=SHORT | {"learning_rate": 0.5})
    expected = alone(base, kind)
    torch.testing.assert_close(of_folder(base, done.out / FOLDER), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(of_folder(base, done.out), expected, rtol=0, atol=1e-5)
    assert done.table["mixture"] == pytest.approx(done.table["one"], abs=1e-6)
    config = json.loads((done.out / FOLDER / "adapter_config.json").read_text("utf-8"))
    assert config["act_fn"] == {"wide": "silu", "gpt2": "gelu_new"}[kind]
    assert config["revision"] == "c0ffee"


def test_it_is_proven_against_all_that_is_simpler(made: Made) -> None:
    assert made.made.proof is not None
    assert [(row.name, row.kind) for row in made.made.proof.table] == [
        ("base", "base"), *((kind, "adapter") for kind in FOUR), ("uniform average", "uniform"),
        (MODEL, "static"), (LAYER, "static"), ("plain LoRA with mean coefficients", "plain"),
        ("mixture", "mixture"),
    ]  # fmt: skip
    assert len(set(made.table.values())) == 10
    assert made.made.proof.exact_nll == pytest.approx(
        made.table["plain LoRA with mean coefficients"], rel=1e-5
    )


def test_the_experts_are_the_adapters_parts_filled_up_with_zeros(
    made: Made, tiny_llama: tiny.Tiny
) -> None:
    config = json.loads((made.out / FOLDER / "adapter_config.json").read_text("utf-8"))
    assert (config["peft_type"], config["num_experts"], config["top_k"]) == ("MIXLORA", 4, 2)
    assert config["router_aux_loss_coef"] == 0.01
    assert config["act_fn"] == "silu", "the peers' readers need it"
    assert config["base_model_name_or_path"] == made.base.name
    assert "revision" not in config, "the base is a folder"
    tensors = load_file(made.out / FOLDER / "adapter_model.safetensors")
    gates = [name for name in tensors if "moe_gate" in name]
    assert gates == [f"mixlora.layers.{i}.mlp.moe_gate.weight" for i in (0, 1)]
    assert all(tensors[name].shape == (4, 32) for name in gates)
    adapters = [deltas(tiny_llama, kind) for kind in FOUR]
    rank = config["expert_lora"]["r"]
    assert rank == config["expert_lora"]["lora_alpha"] == 6  # of "wide"
    for layer in (0, 1):
        for proj in ("gate_proj", "up_proj", "down_proj"):
            for e, adapter in enumerate(adapters):
                stem = f"mixlora.layers.{layer}.mlp.{proj}.experts.{e}"
                a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
                assert (a.shape[0], b.shape[1]) == (rank, rank)
                own = adapter.get(f"model.layers.{layer}.mlp.{proj}")
                expected = torch.zeros_like(b @ a) if own is None else own.dense()
                torch.testing.assert_close(b @ a, expected)


@pytest.mark.parametrize("attention", ["average", "learn", "wide"])
def test_the_attention_gets_what_was_asked_for(
    attention: str, made: Made, tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    method = {"type": "mixlora", "attention": attention, "training": {"max_steps": 1}}
    done = made
    if attention != "learn":
        done = mix(tiny_llama, tmp_path / "out", method, FOUR)
    routing = done.facts["routing"]
    static = routing["static"]
    assert len(set(static.values())) == 4
    expected = {"average": [0.25] * 4, "learn": list(static.values()), "wide": [0, 1, 0, 0]}
    assert routing["attention"] == dict(zip(FOUR, expected[attention], strict=True))
    config = json.loads((done.out / FOLDER / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == config["lora_alpha"]
    tensors = load_file(done.out / FOLDER / "adapter_model.safetensors")
    whole = weighted_sum([deltas(tiny_llama, kind) for kind in FOUR], expected[attention])
    for layer in (0, 1):
        for proj in ("q_proj", "k_proj", "v_proj", "o_proj"):
            stem = f"mixlora.layers.{layer}.self_attn.{proj}"
            found = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            own = whole[f"model.layers.{layer}.self_attn.{proj}"].dense()
            torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


def test_the_plain_lora_is_the_sum_with_the_mean_weights(made: Made, tiny_llama: tiny.Tiny) -> None:
    routing = made.facts["routing"]
    assert list(routing["mean"]) == ["model.layers.0", "model.layers.1"]
    found = load_deltas(made.out, read_facts(made.out))
    adapters = [deltas(tiny_llama, kind) for kind in FOUR]
    assert found.keys() == {name for adapter in adapters for name in adapter}
    for name, delta in found.items():
        layer = ".".join(name.split(".")[:3])
        said = routing["mean"][layer] if ".mlp." in name else routing["attention"]
        own: list[Deltas] = [{name: a[name]} if name in a else {} for a in adapters]
        expected = weighted_sum(own, [said[kind] for kind in FOUR])[name]
        torch.testing.assert_close(delta.dense(), expected.dense(), rtol=1e-4, atol=1e-6)
    # "plain" has no feed-forward: its coefficient is that of its part of the attention.
    assert made.made.coefficients["plain"] == pytest.approx(routing["attention"]["plain"])
    assert made.made.coefficients["wide"] != pytest.approx(routing["attention"]["wide"])


def test_what_the_routers_do_is_told_token_by_token(made: Made, tiny_llama: tiny.Tiny) -> None:
    # One row at a time, so without padding, and from the logits alone.
    model = PeftModel.from_pretrained(tiny_llama.model(), str(made.out / FOLDER)).eval()
    heard: dict[int, list[torch.Tensor]] = {}

    def seen(_: str, layer: int, found: torch.Tensor, *__: object) -> None:
        heard.setdefault(layer, []).append(found.double())

    with torch.inference_mode(), model.watching(seen):
        for row in encoded(made.base, 6):
            model(torch.tensor([[*row.prompt, *row.output]]))
    routing = made.facts["routing"]
    for layer, each in heard.items():
        every = torch.cat(each)
        best = every.topk(2, -1)
        weights = torch.zeros_like(every).scatter(-1, best.indices, best.values.softmax(-1))
        name = f"model.layers.{layer}"
        load = (weights > 0).double().mean(0)
        assert list(routing["load"][name].values()) == pytest.approx(load.tolist())
        assert sum(routing["load"][name].values()) == pytest.approx(2)
        mean = list(routing["mean"][name].values())
        assert mean == pytest.approx(weights.mean(0).tolist(), abs=1e-5)
        p = every.softmax(-1)
        entropy = float(-(p * p.log()).sum(-1).mean())
        assert routing["entropy"][name] == pytest.approx(entropy, abs=1e-5)
        assert routing["entropy_share"][name] == pytest.approx(entropy / math.log(4), abs=1e-5)


def test_dead_experts_are_named(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    parts = parts_of(tiny_llama, FOUR, k=1)
    written(tiny_llama, tmp_path / "m", parts, two_of(1, 4))
    base = tiny_llama.base()
    seen = observed(base, tmp_path / "m", encoded(base, 6), 4)
    told = ExpertRouter.of(MixLora(), FOUR, [0.25] * 4, parts, seen)
    assert told.dead == (
        "layer 0: plain", "layer 0: patterns", "layer 1: plain", "layer 1: patterns",
    )  # fmt: skip
    assert told.load["model.layers.0"]["plain"] == 0
    assert sum(told.load["model.layers.1"].values()) == pytest.approx(1)


def test_nothing_but_routers_is_trained_unless_experts_are_asked_for(
    made: Made, tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    method = {"type": "mixlora", "train_experts": True, "training": SHORT}
    done = mix(tiny_llama, tmp_path / "out", method, FOUR)
    assert made.facts["routing"]["trained"] == "routers"
    assert done.facts["routing"]["trained"] == "routers and experts"
    tensors = load_file(done.out / FOLDER / "adapter_model.safetensors")
    parts = parts_of(tiny_llama, FOUR)
    start = tensors_of(parts, tiny_llama.model(), dtype="float32", seed=0, trains=True)
    assert tensors.keys() == start.keys()
    changed = {name for name in tensors if not torch.equal(tensors[name], start[name])}
    assert changed >= {name for name in tensors if "moe_gate" in name}
    untouched = load_file(made.out / FOLDER / "adapter_model.safetensors")
    still = tensors_of(parts, tiny_llama.model(), dtype="float32", seed=0, trains=False)
    assert all(torch.equal(untouched[name], still[name]) for name in still if ".experts." in name)
    assert not any(
        torch.equal(untouched[name], still[name]) for name in still if "moe_gate" in name
    )
    assert not {name for name in changed if "self_attn" in name}
    # An expert of zeros learns, too.
    experts = {name for name in changed if ".experts.0." in name and "lora_B" in name}
    assert len(experts) == 6
    # And its plain LoRA is the sum of what was trained.
    plain, mean = load_deltas(done.out, read_facts(done.out)), done.facts["routing"]["mean"]
    stem = "mixlora.layers.1.mlp.down_proj.experts"
    parts_there = [
        LowRank(tensors[f"{stem}.{e}.lora_A.weight"], tensors[f"{stem}.{e}.lora_B.weight"])
        for e in range(4)
    ]
    expected = weighted_sum([{"": p} for p in parts_there], mean["model.layers.1"].values())[""]
    torch.testing.assert_close(
        plain["model.layers.1.mlp.down_proj"].dense(), expected.dense(), rtol=1e-4, atol=1e-6
    )


def test_room_that_is_filled_up_for_training_changes_nothing(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    parts = parts_of(tiny_llama, FOUR)
    plain = written(tiny_llama, tmp_path / "plain", parts)
    tensors = tensors_of(parts, tiny_llama.model(), dtype="float32", seed=0, trains=True)
    (tmp_path / "filled").mkdir()
    tensors |= {name: plain[name] for name in plain if "moe_gate" in name}
    write_mixlora(tmp_path / "filled", parts.mix, tensors)
    found = of_folder(tiny_llama, tmp_path / "filled")
    torch.testing.assert_close(found, of_folder(tiny_llama, tmp_path / "plain"))


def test_routers_are_held_to_equal_loads(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    most = {}
    base, run = tiny_llama.base(), {"max_steps": 20, "learning_rate": 0.05, "warmup_ratio": 0.0}
    for coefficient in (0.0, 30.0):
        told = {"training": run, "router_aux_loss_coef": coefficient}
        parts = parts_of(tiny_llama, FOUR, k=1, **told)
        folder = tmp_path / str(coefficient)
        # From a start at which two experts get everything.
        tensors = written(tiny_llama, folder, parts, two_of(1, 4))
        method = MixLora.model_validate(told)
        found, loss = train_routers(method, base, folder, encoded(base, 6), seed=0)
        assert len(loss) == 20
        assert found.keys() == tensors.keys()
        write_mixlora(folder, parts.mix, found)
        seen = observed(base, folder, encoded(base, 6), 4)
        most[coefficient] = max(float(each.load.max()) for each in seen.values())
    assert most[30.0] < 0.45
    assert most[0.0] > most[30.0] + 0.1


def test_what_balances_is_the_formula_of_each_micro_batch_without_its_padding(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    base = tiny_llama.base()
    parts = parts_of(tiny_llama, FOUR, router_aux_loss_coef=0.5)
    written(tiny_llama, tmp_path / "m", parts)
    ids = torch.tensor([[1, 40, 41, 42], [1, 50, 51, 0], [1, 60, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    shares = [Share(0, 0, 1), Share(0, 1, 3)]
    with stock_peft(base, tmp_path / "m", is_trainable=True) as model:
        heard: list[torch.Tensor] = []
        with MoeStanding(model) as standing:
            standing.begin(shares, real)
            with model.watching(lambda _, layer, found, *rest: heard.append(found)):
                model(ids, attention_mask=real.long())
            extra = standing.extra()
            assert all(value.requires_grad for value in extra.values())
            assert not model.training
    for number, kept in enumerate([[0, 1, 2, 3], [4, 5, 6, 8, 9]]):
        expected = router_losses([each[kept] for each in heard], parts.mix)["aux"]
        torch.testing.assert_close(extra[number].detach(), expected)
        assert float(expected) > 0.5  # 2 at uniform routing, times the coefficient


def test_the_base_is_left_as_it_was(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base = tiny_llama.base()
    before, names = logits(base.model), [n for n, _ in base.model.named_modules()]
    hooks = [len(base.model._forward_hooks), len(base.model._forward_pre_hooks)]
    parts = parts_of(tiny_llama, FOUR)
    written(tiny_llama, tmp_path / "m", parts)
    with stock_peft(base, tmp_path / "m") as model:
        inside = logits(model)
    assert (inside - before).abs().max() > 1e-3
    PeftModel.from_pretrained(base.model, str(tmp_path / "m"))
    unload(base.model)
    assert [n for n, _ in base.model.named_modules()] == names
    assert [len(base.model._forward_hooks), len(base.model._forward_pre_hooks)] == hooks
    assert torch.equal(logits(base.model), before)


def test_experts_are_written_in_the_recipe_s_dtype_and_routers_in_float32(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    method = {"type": "mixlora", "training": SHORT}
    done = mix(
        tiny_llama, tmp_path / "out", method, ("wide", "rslora"),
        output={"dtype": "bfloat16"}, dtype=torch.bfloat16,
    )  # fmt: skip
    tensors = load_file(done.out / FOLDER / "adapter_model.safetensors")
    for name, value in tensors.items():
        wanted = torch.float32 if "moe_gate" in name else torch.bfloat16
        assert value.dtype == wanted, name


def test_adapters_that_cannot_be_experts_are_refused_by_name(
    tiny_llama: tiny.Tiny, tiny_t5: tiny.Tiny, tmp_path: Path
) -> None:
    def refused(kinds: Sequence[str]) -> str:
        with pytest.raises(IncompatibleAdapters) as caught:
            mix(tiny_llama, tmp_path / "-".join(kinds), {"type": "mixlora"}, kinds)
        return str(caught.value)

    said = refused(["plain", "same"])
    assert said.startswith("none of the adapters changes the feed-forward modules (gate_proj, up_p")
    assert refused(["wide", "head"]).startswith("head: lm_head is in no decoder layer")
    assert refused(["embedding", "wide"]).startswith("embedding: model.embed_tokens is an embeddin")
    with pytest.raises(IncompatibleAdapters, match="has an encoder"):
        copies(tiny_t5, "t5", tmp_path)


def test_training_that_diverges_is_told(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    method = {
        "type": "mixlora", "train_experts": True,
        "training": {"max_steps": 20, "learning_rate": 1e30, "warmup_ratio": 0.0},
    }  # fmt: skip
    with pytest.raises(NotApplied, match="the routers' training diverged") as caught:
        mix(tiny_llama, tmp_path / "out", method, ("wide", "rslora"))
    assert "learning_rate" in str(caught.value.hint)
