"""MixLoRA, LoRAMoE, MoLA and dynamic mixtures after what went wrong, and what they refuse."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from lorahub_registry.compose.experts import MoeStanding
from lorahub_registry.errors import (
    BrokenAdapter,
    IncompatibleAdapters,
    LoraregError,
    UsageError,
)
from lorahub_registry.runtime.mixlora import MixLoraConfig
from lorahub_registry.runtime.moe_layer import layers_of
from lorahub_registry.runtime.plugged import LoraMoeConfig, MolaConfig
from tests.mixlora import ATTENTION, MLP, make, save
from tests.runtime.conftest import Mixture
from tests.runtime.moe_making import IDS, LEFT, LOUD, base, checkpoint, load, logits, tree

pytestmark = pytest.mark.filterwarnings("ignore")
Make = Callable[..., Mixture]
KINDS = ("mixlora", "loramoe", "mola", "mixture")


def config(**more: Any) -> MixLoraConfig:
    return MixLoraConfig(**{"target_modules": [*ATTENTION, *MLP], "num_experts": 4, "r": 4, **more})


@pytest.fixture
def loaded(request: pytest.FixtureRequest, tmp_path: Path, mixture: Make) -> tuple[Any, Path]:
    """(A model with an adapter, a folder for it that cannot be loaded.)"""
    if request.param == "mixture":
        model = mixture("layer").load()
        folder = tmp_path / "bad"
        model.save_pretrained(folder)
        said = json.loads((folder / "adapter_config.json").read_text())
        said["mixture"]["sha256"] = "0" * 64
        (folder / "adapter_config.json").write_text(json.dumps(said))
        tensors = {**get_peft_model_state_dict(model)}
        tensors.pop(sorted(tensors)[0])
        (folder / "adapter_model.safetensors").unlink()
        torch.save(tensors, folder / "adapter_model.bin")
        return model, folder
    model = load(save(tmp_path / "good", make(request.param, **LOUD)))
    said, tensors = make(request.param, seed=5, **LOUD)
    tensors[sorted(tensors)[-1]].fill_(torch.nan)
    return model, save(tmp_path / "bad", (said, tensors))


@pytest.mark.parametrize("loaded", KINDS, indirect=True)
def test_a_load_that_fails_leaves_the_adapter_that_is_there(loaded: tuple[Any, Path]) -> None:
    model, bad = loaded
    with torch.no_grad():
        before = tree(model)
        with pytest.raises(LoraregError):
            model.load_adapter(str(bad), "default")
        assert tree(model) == before  # though it has never run
        wanted = logits(model)
        with pytest.raises(LoraregError):
            model.load_adapter(str(bad), "default")
        tensors = get_peft_model_state_dict(model)
        whole = dict(tensors)
        tensors.pop(sorted(tensors)[-1])
        with pytest.raises(LoraregError):
            set_peft_model_state_dict(model, tensors)
        assert tree(model) == before
        assert torch.equal(logits(model), wanted)
        set_peft_model_state_dict(model, whole)
        assert torch.equal(logits(model), wanted)
        # A second one, that fails as it comes, leaves nothing.
        with pytest.raises(LoraregError):
            model.load_adapter(str(bad), "second")
        assert tree(model) == before
        assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("ran", [False, True])
def test_a_load_that_fails_leaves_what_was_made_to_be_trained(ran: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    read = MixLoraConfig.from_pretrained(str(checkpoint(tmp_path)))
    model = get_peft_model(base(), read if ran else config())
    if ran:
        logits(model)
    before = tree(model)
    tensors = get_peft_model_state_dict(model)
    tensors.pop(sorted(tensors)[0])
    with pytest.raises(BrokenAdapter):
        set_peft_model_state_dict(model, tensors)
    assert tree(model) == before


def test_a_mixture_that_fails_leaves_no_check_behind(mixture: Make, tmp_path: Path) -> None:
    made = mixture("layer")
    model, folder = made.load(), tmp_path / "bad"
    model.save_pretrained(folder)
    tensors = {**get_peft_model_state_dict(model)}
    tensors.pop(sorted(tensors)[0])
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    clean = made.base.model()
    wanted = logits(clean)
    with pytest.raises(LoraregError):
        load(folder, clean)
    assert torch.equal(logits(clean), wanted)


@torch.no_grad()
def test_a_mixture_comes_again_when_the_last_has_gone(mixture: Make) -> None:
    made = mixture("layer")
    model = made.load()
    wanted = logits(model)
    model.delete_adapter("default")
    model.load_adapter(str(made.folder), "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), wanted)


@torch.no_grad()
def test_a_cache_of_another_adapter_is_refused(tmp_path: Path) -> None:
    first = checkpoint(tmp_path, "mixlora-switch", seed=1)
    model = load(first)
    model.load_adapter(str(checkpoint(tmp_path, "mixlora-switch", seed=2)), "b")
    mine = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
    model.set_adapter("b")
    with pytest.raises(IncompatibleAdapters, match="cache was not begun with this adapter"):
        logits(model, IDS[:, 5:], past_key_values=mine)
    # One that has gone, and come again, has begun none, whether others have or not.
    names = ["default", "b", "b"]
    for given in ({}, {"adapter_names": names}):
        model.set_adapter("default")
        cache = model(input_ids=IDS[:, :5], use_cache=True, **given).past_key_values
        model.delete_adapter("default")
        model.load_adapter(str(first), "default")
        model.set_adapter("default")
        with pytest.raises(IncompatibleAdapters, match="cache was not begun with this adapter"):
            logits(model, IDS[:, 5:], past_key_values=cache, **given)


@pytest.mark.parametrize("trains", ["experts", "nothing"])
def test_a_frozen_router_is_no_checkpointing(trains: str, tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, targets=MLP), is_trainable=True).train()
    for name, value in model.named_parameters():
        frozen = name.endswith(".gate") or trains == "nothing"
        value.requires_grad_("lora_" in name and not frozen)
    out = model(input_ids=IDS, labels=IDS)
    assert bool(out.aux_loss > 0)
    if trains == "experts":
        out.loss.backward()
        assert any(p.grad is not None for p in model.parameters())
    # One frozen router of two hides no other's lost gradient.
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name and "layers.0.mlp" not in name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(IncompatibleAdapters, match="reentrant checkpointing"):
        model(input_ids=IDS, labels=IDS)


def test_a_forward_that_fails_is_over(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "mixlora-switch"), is_trainable=True)
    flow = model.base_model._flow

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    for train in (False, True):
        model.train(train)
        handle = model.base_model.model.lm_head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(input_ids=LEFT, attention_mask=(LEFT != 0).long())
        assert (flow.within, flow.real, flow.collects) == (False, None, False)
        handle.remove()
        with pytest.raises(IncompatibleAdapters, match="called apart from its model"):
            model.base_model.model.model(IDS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(IncompatibleAdapters, match="reentrant"):
        model(input_ids=LEFT, attention_mask=(LEFT != 0).long())
    assert (flow.within, flow.real, flow.collects) == (False, None, False)


@pytest.mark.parametrize("kind", [LoraMoeConfig, MolaConfig])
def test_what_has_no_training_is_not_trained(kind: Any, tmp_path: Path) -> None:
    model = base()
    before = tree(model)
    with pytest.raises(UsageError, match="not trained") as caught:
        get_peft_model(model, kind(target_modules=["up_proj"], num_experts=4, r=4))
    assert "MixLoraConfig" in str(caught.value.hint)
    name = "loramoe" if kind is LoraMoeConfig else "mola"
    with pytest.raises(UsageError, match="not trained"):
        load(save(tmp_path / "a", make(name)), model, is_trainable=True)
    assert tree(model) == before


def told(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "out.aux_loss" in str(one.message)]


def test_a_loss_that_the_caller_computes_is_told_of_once(tmp_path: Path) -> None:
    def model() -> Any:
        return load(checkpoint(tmp_path), is_trainable=True).train()

    one = model()
    assert not told(lambda: one(input_ids=IDS, labels=IDS))
    assert not told(lambda: one(input_ids=IDS, labels=IDS, return_dict=False))
    with torch.no_grad():
        assert not told(lambda: one(input_ids=IDS))
    assert not told(lambda: one.eval()(input_ids=IDS))
    with MoeStanding(one):  # the project's own trainer, which takes the losses by itself
        assert not told(lambda: one(input_ids=IDS))
    one.train()
    assert len(told(lambda: (one(input_ids=IDS), one(input_ids=IDS)))) == 1
    assert len(told(lambda: model()(input_ids=IDS, return_dict=False))) == 1
    frozen = model()
    for name, value in frozen.named_parameters():
        value.requires_grad_("lora_" in name and not name.endswith(".gate"))
    assert not told(lambda: frozen(input_ids=IDS))
    off = load(checkpoint(tmp_path, router_loss=False), is_trainable=True).train()
    assert not told(lambda: off(input_ids=IDS))


def test_label_smoothing_is_told_of(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def train(smoothing: float) -> None:
        options = hf.TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=3,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            label_smoothing_factor=smoothing,
        )  # fmt: skip
        model = load(checkpoint(tmp_path), is_trainable=True)
        hf.Trainer(model=model, args=options, train_dataset=rows).train()

    assert len(told(lambda: train(0.1))) == 1
    assert not told(lambda: train(0.0))


def test_shifted_labels_share_a_step_too(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, router_aux_loss_coef=0.5), is_trainable=True).train()
    shifted = IDS.clone()
    shifted[:, :3] = -100
    given = {"input_ids": IDS, "labels": IDS, "shift_labels": shifted}
    real = int((shifted != -100).sum())
    whole = model(**given, num_items_in_batch=real)
    half = model(**given, num_items_in_batch=2 * real)
    torch.testing.assert_close(2 * half.loss, whole.loss)
    bare = model.eval()(**given, num_items_in_batch=real)
    torch.testing.assert_close(whole.loss, bare.loss + whole.aux_loss)


def test_all_linear_is_what_the_layers_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(base(), config(target_modules="all-linear"))
    model.save_pretrained(tmp_path / "a")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted([*ATTENTION, *MLP])
    twin = load(tmp_path / "a")
    assert get_peft_model_state_dict(twin).keys() == get_peft_model_state_dict(model).keys()
    model.add_adapter("second", config(target_modules="all-linear"))
    assert model.peft_config["second"].target_modules == {*ATTENTION, *MLP}
    untouched = base()
    with pytest.raises(UsageError, match="target_modules is missing") as caught:
        get_peft_model(untouched, config(target_modules=None))
    assert "all-linear" in str(caught.value.hint)
    assert not list(layers_of(untouched))


def test_a_gaussian_start_is_taken(tmp_path: Path) -> None:
    found = {}
    for start in (True, "gaussian"):
        torch.manual_seed(0)
        model = get_peft_model(base(), config(init_lora_weights=start, r=8))
        found[start] = {n: p for n, p in model.named_parameters() if n.endswith("_A")}
        with torch.no_grad():
            torch.testing.assert_close(logits(model), logits(base()), rtol=1e-4, atol=1e-5)
        attention = next(p for n, p in model.named_parameters() if "q_proj.lora_A" in n)
        found[start]["attention"] = attention
        model.save_pretrained(tmp_path / str(start))
        said = json.loads((tmp_path / str(start) / "adapter_config.json").read_text())
        assert "init_lora_weights" not in said
    for name, value in found["gaussian"].items():
        assert float(value.std()) == pytest.approx(1 / 8, rel=0.2)
        assert float(value.abs().max()) > float(found[True][name].abs().max())


@pytest.mark.parametrize("within", ["extra", "mlp.extra"])
def test_two_modules_of_one_name_are_refused(within: str) -> None:
    model = base()
    last = "q_proj" if within == "extra" else "up_proj"
    for layer in model.model.layers:
        held = torch.nn.Module()
        held.add_module(last, torch.nn.Linear(32, 32, bias=False))
        parent, _, name = within.rpartition(".")
        layer.get_submodule(parent).add_module(name, held)
    twin = "self_attn.q_proj" if within == "extra" else "mlp.up_proj"
    before = tree(model)
    with pytest.raises(IncompatibleAdapters, match="have one name") as caught:
        get_peft_model(model, config(target_modules=["q_proj", "up_proj"]))
    for name in (f"{within}.{last}", twin):
        assert f"model.layers.0.{name} " in str(caught.value)
    assert tree(model) == before
    get_peft_model(model, config(target_modules=["v_proj", "down_proj"]))


@pytest.mark.parametrize("kind", ["mixlora", "loramoe", "mola"])
def test_the_bases_commit_is_kept(kind: str, tmp_path: Path) -> None:
    for revision in ("c0ffee", None):
        (place := tmp_path / str(revision)).mkdir()
        model = load(checkpoint(place, kind, revision=revision))
        assert model.peft_config["default"].revision == revision
        model.save_pretrained(place / "again")
        said = json.loads((place / "again" / "adapter_config.json").read_text())
        assert said.get("revision", "absent") == (revision or "absent")


@pytest.mark.parametrize("targets", [["up_proj"], "all-linear", None])
def test_more_experts_of_a_token_than_there_are(targets: Any) -> None:
    with pytest.raises(BrokenAdapter, match="top_k is 5"):
        config(top_k=5, target_modules=targets)


@pytest.mark.parametrize("strategy", ["mixlora", "mixlora-switch"])
@torch.no_grad()
def test_what_jitter_shakes(strategy: str, tmp_path: Path) -> None:
    """Of top-k what experts read, too; of switch what the router reads alone."""
    more = {"experts": 1, "jitter_noise": 0.5, "targets": MLP}
    more |= {"top_k": 1} if strategy == "mixlora" else {"expert_capacity": 9}
    model = load(checkpoint(tmp_path, strategy, **more))
    quiet = logits(model)
    assert torch.equal(logits(model.train()), quiet) == (strategy == "mixlora-switch")


def test_a_config_made_in_memory_names_no_file(tmp_path: Path) -> None:
    with pytest.raises(BrokenAdapter) as caught:
        MixLoraConfig(target_modules=["up_proj"], num_experts=0, top_k=2)
    first, *problems = str(caught.value).splitlines()
    assert first == "MixLoraConfig: as a MIXLORA adapter it says what cannot be:"
    assert problems == ["  num_experts is 0, not a whole number from 1 to 4096"]
    folder = save(tmp_path, make())
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | {"num_experts": 0}))
    with pytest.raises(BrokenAdapter, match=r"^adapter_config\.json: as a MIXLORA"):
        MixLoraConfig.from_pretrained(str(folder))


def test_it_takes_no_coefficients(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path))
    with pytest.raises(UsageError, match="the router of each layer weighs its experts") as caught:
        model.coefficients(torch.ones(4))
    assert "watching" in str(caught.value.hint)
