"""MixLoRA while it generates and trains: caches, padding, checkpointing, the router's losses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from transformers import DynamicCache

from lorahub_registry.errors import IncompatibleAdapters, UsageError
from lorahub_registry.runtime.mixlora import MixLoraConfig
from lorahub_registry.runtime.mixture import RowsMerged
from lorahub_registry.runtime.moe import router_losses
from lorahub_registry.runtime.moe_layer import layers_of
from tests.mixlora import ATTENTION, MLP, legacy, make, save
from tests.runtime.moe_making import IDS, LEFT, LOUD, RIGHT, ROUTED, base, checkpoint, load, logits

pytestmark = pytest.mark.filterwarnings("ignore")
AUX = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}
PLAIN, AGAIN = {"use_reentrant": False}, {"use_reentrant": True}


def tokens(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    """Greedy continuations; padding is masked."""
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": (ids != 0).long(), **more}
    found: torch.Tensor = model.generate(input_ids=ids, **options)
    return found[:, ids.shape[1] :]


def training(folder: Path, model: Any = None) -> Any:
    return load(folder, model, is_trainable=True).train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() != set()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("strategy", ROUTED)
def test_the_cache_changes_no_token(strategy: str, tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, strategy))
    found = tokens(model)
    assert torch.equal(found, tokens(model, use_cache=False))
    assert torch.equal(found, tokens(model))
    assert not torch.equal(found, tokens(base()))


@pytest.mark.parametrize("ids", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("strategy", ROUTED)
@torch.no_grad()
def test_padding_changes_no_row(strategy: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, strategy, expert_capacity=1))
    mask = (ids != 0).long()
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = logits(model, ids, attention_mask=mask, position_ids=places)
    for row, keep in enumerate(mask.bool()):
        alone = logits(model, ids[row, keep][None])
        torch.testing.assert_close(whole[row, keep], alone[0], rtol=1e-5, atol=1e-4)
    if ids is LEFT:
        several = tokens(model, ids)
        for row in range(3):
            alone = tokens(model, ids[row][ids[row] != 0][None])
            length = min(alone.shape[1], several.shape[1])
            assert torch.equal(several[row, :length], alone[0, :length])


@torch.no_grad()
def test_room_is_counted_through_the_cache(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "mixlora-switch"))
    whole, caches = logits(model), [DynamicCache(), DynamicCache()]
    other = logits(model, IDS.flip(0))
    # Two caches by turns, in pieces.
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        for cache, ids, wanted in zip(caches, (IDS, IDS.flip(0)), (whole, other), strict=True):
            mask = torch.ones(3, stop).long()
            piece = ids[:, start:stop]
            found = logits(model, piece, past_key_values=cache, attention_mask=mask)
            torch.testing.assert_close(found, wanted[:, start:stop], rtol=1e-5, atol=1e-4)
    # As a tuple, with and without a loss.
    for more in ({}, {"labels": IDS[:, :4]}):
        first = model(input_ids=IDS[:, :4], return_dict=False, use_cache=True, **more)
        cache = first[-1]
        found = logits(model, IDS[:, 4:], past_key_values=cache)
        torch.testing.assert_close(found, whole[:, 4:], rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_cache_whose_room_is_not_known_is_refused(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "mixlora-switch"))
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    for other in (copy.deepcopy(cache), base()(input_ids=IDS, use_cache=True).past_key_values):
        with pytest.raises(IncompatibleAdapters, match="cache was not begun with this adapter"):
            logits(model, IDS[:, :1], past_key_values=other)
    cache.crop(-1)  # whose room is still full
    with pytest.raises(IncompatibleAdapters, match="cache was not begun"):
        logits(model, IDS[:, :1], past_key_values=cache)
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([0, 0]))
    with pytest.raises(IncompatibleAdapters, match="of 3 rows and the batch of 2"):
        logits(model, IDS[:2, :1], past_key_values=cache)
    top_k = load(checkpoint(tmp_path))  # the other routings need not know
    assert logits(top_k, IDS[:, :1], past_key_values=DynamicCache()).isfinite().all()


def test_what_changes_rows_is_refused(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "mixlora-switch"))
    for more in (
        {"num_beams": 3},
        {"generation_config": hf.GenerationConfig(num_beams=2, max_new_tokens=2)},
        {"assistant_model": base()},
    ):
        with pytest.raises(UsageError, match="beams and assistants"):
            tokens(model, **more)
    with pytest.raises(UsageError, match="beams and assistants"):
        model.base_model.generate(IDS, hf.GenerationConfig(num_beams=2, max_new_tokens=2))
    assert tokens(load(checkpoint(tmp_path)), num_beams=3).shape[0] == 3


@torch.no_grad()
def test_switch_refuses_to_guess(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "mixlora-switch"))
    square = torch.ones(3, 1, 7, 7).bool().tril()
    with pytest.raises(IncompatibleAdapters, match="does not tell tokens from padding"):
        logits(model, attention_mask=square)
    assert logits(model).isfinite().all()
    inner = model.base_model.model
    with pytest.raises(IncompatibleAdapters, match="called apart from its model"):
        inner.model(IDS)
    layer = next(layer for _, layer in layers_of(model))
    with pytest.raises(RowsMerged, match="counts each row's tokens"):
        layer(torch.randn(4, 32))


@pytest.mark.parametrize("strategy", ROUTED)
def test_the_routers_loss_is_added_while_it_trains(strategy: str, tmp_path: Path) -> None:
    model = training(checkpoint(tmp_path, strategy, **AUX))
    mask, labels = (LEFT != 0).long(), LEFT.masked_fill(LEFT == 0, -100)
    given = {"input_ids": LEFT, "attention_mask": mask, "labels": labels}
    model.eval()
    bare, layers = model(**given), []
    assert not hasattr(bare, "aux_loss")
    with model.base_model.watching(lambda _a, _i, given, *_: layers.append(given)):
        again = model(**given)
    assert torch.equal(again.logits, bare.logits)
    assert torch.equal(again.loss, bare.loss)
    mix = model.peft_config["default"].mix
    wanted = router_losses(layers, mix, mask.flatten().bool())
    other = router_losses(layers, mix)
    model.train()
    for _ in range(2):  # nothing is left of the forward before
        out = model(**given)
        torch.testing.assert_close(out.aux_loss, wanted["aux"])
        assert not torch.allclose(out.aux_loss, other["aux"])
        torch.testing.assert_close(out.loss, bare.loss + sum(wanted.values()))
        torch.testing.assert_close(out.logits, bare.logits)
        apart = model.base_model.router_losses("default")
        assert torch.equal(apart["aux"], out.aux_loss)
    assert hasattr(out, "z_loss") == (strategy == "mixlora-switch")
    assert torch.equal(model(**given, return_dict=False)[0], out.loss)
    assert model(input_ids=LEFT, return_dict=False)[0].dim() == 3
    assert "aux_loss" in model(input_ids=LEFT)
    with model.disable_adapter():
        assert "aux_loss" not in model(**given)
    assert torch.equal(model.eval()(**given).loss, bare.loss)


def test_the_routers_loss_can_be_switched_off(tmp_path: Path) -> None:
    model = training(checkpoint(tmp_path, router_loss=False))
    assert "aux_loss" not in model(input_ids=IDS, labels=IDS)


def test_each_adapter_has_its_own_loss(tmp_path: Path) -> None:
    """Also one whose experts begin at a later layer than another's."""
    sparse = save(
        tmp_path / "s", legacy(make("mixlora-switch", **LOUD, targets=MLP), sparse_step=2)
    )
    alone = training(sparse)(input_ids=IDS, labels=IDS)
    assert float(alone.aux_loss) > 0
    model = load(checkpoint(tmp_path), adapter_name="one", is_trainable=True)
    model.load_adapter(str(checkpoint(tmp_path, experts=6)), adapter_name="two", is_trainable=True)
    wanted = training(checkpoint(tmp_path, experts=6))(input_ids=IDS, labels=IDS)
    model.set_adapter("two")
    out = model.train()(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.loss, wanted.loss)
    torch.testing.assert_close(out.aux_loss, wanted.aux_loss)


def test_batches_of_one_step_share_one_loss(tmp_path: Path) -> None:
    """As transformers' Trainer tells how many labels a step has: not once for every batch."""
    model = training(checkpoint(tmp_path, **AUX))
    labels = 2 * (IDS[:, 1:] != -100).sum()
    given = {"input_ids": IDS, "labels": IDS}
    whole, half = model(**given), model(**given, num_items_in_batch=labels)
    torch.testing.assert_close(2 * half.loss, whole.loss)
    torch.testing.assert_close(half.aux_loss, whole.aux_loss)


def test_noise_is_of_training_alone(tmp_path: Path) -> None:
    for strategy, more in (
        ("mixlora", {"lora_dropout": 0.5}),
        ("mixlora", {"jitter_noise": 0.3}),
        ("mixlora-switch", {"ffn_dropout": 0.5, "lora_dropout": 0.0}),
        ("mixlora-switch", {"jitter_noise": 0.9}),
    ):
        quiet = {"lora_dropout": 0.0, "jitter_noise": 0.0, **more}
        model = training(checkpoint(tmp_path, strategy, targets=MLP, expert_capacity=9, **quiet))
        with torch.no_grad():
            assert not torch.equal(logits(model), logits(model)), more
            plain = load(checkpoint(tmp_path, strategy, targets=MLP, expert_capacity=9))
            assert torch.equal(logits(model.eval()), logits(plain)), more


@pytest.mark.parametrize("strategy", ROUTED)
def test_checkpointing_changes_no_gradient(strategy: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, strategy, **AUX, lora_dropout=0.2)
    model = training(folder)
    batches = []
    for ids in (LEFT, RIGHT):
        mask = (ids != 0).long()
        labels = ids.masked_fill(ids == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def steps() -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        found = []
        for given in batches:
            out = model(**given)
            with torch.no_grad():
                model(input_ids=IDS)  # what is asked in between disturbs nothing
            out.loss.backward()
            found.append(gradients(model))
        first, second = (model(**given) for given in batches)
        second.loss.backward()
        found.append(gradients(model))
        first.logits.square().sum().backward()
        return [*found, gradients(model)]

    wanted = steps()
    assert any("gate" in name and value.any() for name, value in wanted[0].items())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=PLAIN)
    for found, one in zip(steps(), wanted, strict=True):
        same(found, one)
    both = [model(**given).loss for given in batches]
    if strategy == "mixlora-switch":
        with pytest.raises(IncompatibleAdapters, match="of which batch is not known"):
            sum(both).backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=AGAIN)
    model.enable_input_require_grads()
    with pytest.raises(IncompatibleAdapters, match="reentrant checkpointing"):
        model(**batches[0])


@pytest.mark.parametrize("strategy", ROUTED)
def test_reentrant_checkpointing_without_the_routers_loss(strategy: str, tmp_path: Path) -> None:
    model = training(checkpoint(tmp_path, strategy, router_loss=False))
    given = {"input_ids": LEFT, "attention_mask": (LEFT != 0).long(), "labels": LEFT}
    model(**given).loss.backward()
    wanted = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=AGAIN)
    model.enable_input_require_grads()
    seen: list[int] = []
    with model.base_model.watching(lambda _, layer, *__: seen.append(layer)):
        model(**given).loss.backward()
    assert seen == [0, 1]  # what is computed again is not told again
    same(gradients(model), wanted)


@pytest.mark.parametrize("strategy", ROUTED)
def test_two_forwards_before_one_backward(strategy: str, tmp_path: Path) -> None:
    model = training(checkpoint(tmp_path, strategy, **AUX))
    wanted: dict[str, torch.Tensor] = {}
    for ids in (IDS, LEFT):
        model(input_ids=ids, labels=ids).loss.backward()
        for name, value in gradients(model).items():
            wanted[name] = wanted.get(name, 0) + value
    (model(input_ids=IDS, labels=IDS).loss + model(input_ids=LEFT, labels=LEFT).loss).backward()
    same(gradients(model), wanted)


def test_compiled_it_is_the_same(tmp_path: Path) -> None:
    """The layer alone: graphs of a whole model take dynamo a minute."""
    torch._dynamo.reset()
    model = training(checkpoint(tmp_path))
    layer = next(layer for _, layer in layers_of(model))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))

    def run(layer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found = layer(x)
        found.square().sum().backward()
        return found, gradients(model)

    wanted = run(layer)
    found = run(torch.compile(layer, backend="aot_eager"))
    torch.testing.assert_close(found[0], wanted[0])
    same(found[1], wanted[1])
    torch._dynamo.reset()


def new(**more: Any) -> Any:
    said: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "num_experts": 4, "top_k": 2, "lora_dropout": 0.0,
        "target_modules": [*ATTENTION, *MLP], "task_type": "CAUSAL_LM", **more,
    }  # fmt: skip
    return get_peft_model(base(), MixLoraConfig(**said))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_it(checkpointing: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = new()
    before = {n: p.clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    options = hf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, use_cpu=True,
        gradient_accumulation_steps=2, report_to=[], save_strategy="no", learning_rate=1e-2,
        logging_steps=1, disable_tqdm=True, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs=PLAIN if checkpointing else None,
    )  # fmt: skip
    trainer = hf.Trainer(model=model, args=options, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == moved


@pytest.mark.parametrize("more", [
    {}, {"use_dora": True}, {"routing_strategy": "mixlora-dynamic", "top_k": None},
    {"routing_strategy": "mixlora-switch", "top_k": None, "expert_capacity": 3},
], ids=str)  # fmt: skip
def test_its_loss_falls(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = new(**more).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(30):
        out = model(input_ids=IDS, labels=IDS)
        losses.append(float(out.loss.detach()))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_on_a_four_bit_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base().save_pretrained(tmp_path / "base")
    quant = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    packed = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quant, dtype=torch.float32
    )
    bare = logits(packed)
    for more in ({}, {"dora": True}):
        folder = checkpoint(tmp_path, **more)
        model = load(folder, packed)
        wide = load(folder, base())
        found, wanted = logits(model), logits(wide)
        assert not torch.allclose(found, bare, atol=1e-2)
        assert float((found - wanted).std()) < float((bare - wanted).std())
        model.unload()
