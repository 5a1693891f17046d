"""MixLoRA adapters in a run with others: as alone, and as a plain loop over the PEFT type."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.evaluate.tokens import IGNORED, one_batch
from lorahub_registry.recipes.factory import AdapterPlan
from lorahub_registry.runtime.grouped_experts import seeded
from lorahub_registry.runtime.mixlora import MixLoraConfig
from lorahub_registry.runtime.mixlora_names import from_native
from lorahub_registry.train.experts import ExpertParameters
from lorahub_registry.train.run import Hooks, train
from lorahub_registry.train.write import write_adapter
from tests.train.making import base_of, learner, llama
from tests.train.test_run import alone, difference

TOP_P = {"routing_strategy": "mixlora-dynamic", "top_p": 0.6}
SWITCH = {"routing_strategy": "mixlora-switch", "expert_capacity": 6, "ffn_dropout": 0.1}
KINDS = [
    {"method": {}, "lora": {"lora_dropout": 0.1}},
    {"lora": {"r": 4}},
    {"method": TOP_P, "lora": {"use_dora": True}, "batch_size": 3},
    {"method": SWITCH},
    {"method": {"jitter_noise": 0.05, "top_k": 3, "expert_lora": {"r": 2, "use_rslora": True}}},
    {"lora": {"target_modules": ("q_proj", "up_proj")}},
    {"method": {}, "lora": {"loraplus_lr_ratio": 4.0, "init_lora_weights": "gaussian"}},
    {
        "method": {"router_loss": False},
        "lora": {"target_modules": ("v_proj", "up_proj", "down_proj")},
        "gradient_accumulation_steps": 2,
        "batch_size": 2,
    },
]


def test_each_becomes_what_it_becomes_alone():
    model = llama(bias=True)
    learners = [learner(model, n, data=n, **options) for n, options in enumerate(KINDS)]
    run = train(base_of(model), learners)
    assert run.together == len(KINDS)
    for n, (options, one) in enumerate(zip(KINDS, learners, strict=True)):
        other = alone(model, n, **options)
        assert one.at.state == "done"
        assert difference(one, other) < 1e-3, KINDS[n]
        assert one.at.loss[-1][1] < one.at.loss[0][1]


def test_computing_layers_twice_gives_the_same():
    model = llama()
    for kind in KINDS[:4]:
        one, other = learner(model, **kind), learner(model, **kind)
        train(base_of(model), [one])
        train(base_of(model), [other], gradient_checkpointing=True)
        assert difference(one, other) < 1e-3, kind


def _peft(model, one):
    """The same adapter as a PEFT model."""
    mix = one.parameters.mix
    own = copy.deepcopy(model)
    config = MixLoraConfig(
        r=mix.attention.r, lora_alpha=mix.attention.lora_alpha, num_experts=mix.num_experts,
        use_dora=mix.attention.use_dora, target_modules=list(mix.target_modules),
        router_aux_loss_coef=mix.router_aux_loss_coef, task_type="CAUSAL_LM",
        routing_strategy=mix.strategy, top_k=getattr(mix.routing, "k", None),
        top_p=getattr(mix.routing, "p", None),
        expert_capacity=getattr(mix.routing, "capacity", None), jitter_noise=0.0,
        act_fn=mix.act_fn, expert_lora={"r": mix.experts.r, "lora_alpha": mix.experts.lora_alpha},
    )  # fmt: skip
    wrapped = get_peft_model(own, config)
    wrapped.load_state_dict(
        from_native(wrapped, "default", config.mix, one.parameters.native()), strict=False
    )
    return wrapped


@pytest.mark.parametrize(
    "kind",
    [
        {"method": {"router_aux_loss_coef": 0.3}},
        {"method": TOP_P, "lora": {"use_dora": True}},
        {"method": SWITCH | {"ffn_dropout": 0.0, "jitter_noise": 0.0}},
        {"method": {"act_fn": "relu", "expert_lora": {"r": 2, "lora_alpha": 3}}},
    ],
    ids=["top-k", "top-p, DoRA", "switch", "its own activation, experts of another form"],
)
def test_a_plain_loop_over_the_peft_type_gives_the_same(kind):
    model = llama()
    options = {"batch_size": 3, "gradient_accumulation_steps": 2, "data": 5, "max_steps": 4}
    one, twin = (learner(model, **kind, **options) for _ in range(2))
    wrapped = _peft(model, one).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    while twin.running:
        micros, outputs = twin.micros(), sum(m.outputs for m in twin.micros())
        for micro in micros:
            items = [item[0] for item in micro.items]
            batch = one_batch(items, range(len(items)), 0, "cpu", seq2seq=False)
            out = wrapped(**batch.inputs, use_cache=False)
            logits = out.logits[:, batch.keep : batch.inputs["input_ids"].shape[1] - 1]
            nll = functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            extra = out.aux_loss + getattr(out, "z_loss", 0.0)
            (nll / outputs + extra * micro.outputs / outputs).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = twin.learning_rate()
        optimizer.step()
        optimizer.zero_grad()
        twin.at.step += 1
        twin.at.state = "done" if twin.at.step == twin.total else "running"
    train(base_of(model), [one])
    found = wrapped.state_dict()
    wanted = from_native(wrapped, "default", wrapped.peft_config["default"].mix,
                         one.parameters.native())  # fmt: skip
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=3e-4, msg=name)


def test_what_is_written_is_what_was_trained(tmp_path):
    model = llama()
    one = learner(model, method={"top_k": 2}, lora={"use_dora": True}, max_steps=3)
    train(base_of(model), [one])
    write_adapter(
        tmp_path, one.parameters, model, base="tiny", base_revision=None, task_type="CAUSAL_LM"
    )
    ids = torch.arange(1, 15).view(2, 7)
    inside = _peft(model, one).eval()(ids).logits
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, inside, rtol=0, atol=1e-6)
    assert float((inside - model(ids).logits).abs().max()) > 1e-3


@pytest.mark.parametrize("revision", ["c0ffee", None])
def test_the_bases_commit_is_written_where_it_is_known(revision, tmp_path):
    model = llama()
    one = learner(model, method={})
    write_adapter(
        tmp_path, one.parameters, model, base="tiny", base_revision=revision, task_type="CAUSAL_LM"
    )
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said.get("revision", "absent") == (revision or "absent")
    assert said["act_fn"] == "silu"
    assert MixLoraConfig.from_pretrained(str(tmp_path)).revision == revision


def test_two_modules_of_one_name_are_refused():
    model = llama()
    for layer in model.model.layers:
        layer.extra = torch.nn.Module()
        layer.extra.q_proj = torch.nn.Linear(32, 32, bias=False)
    with pytest.raises(
        IncompatibleAdapters, match=r"extra\.q_proj and .*attn\.q_proj have one name"
    ):
        learner(model, method={}, lora={"target_modules": ("q_proj", "up_proj")})
    learner(model, method={}, lora={"target_modules": ("v_proj", "up_proj")})


def test_the_routers_loss_is_told_apart():
    told = []
    one = learner(llama(), method={"router_aux_loss_coef": 0.5}, max_steps=2)
    other = learner(llama(), 1, max_steps=2)
    hooks = Hooks(logged=lambda learner, entry: told.append((learner.number, entry)))
    train(base_of(llama()), [one, other], hooks=hooks)
    aux = {number: entry.get("aux_loss") for number, entry in told}
    # Near uniform at first: k times the coefficient.
    assert aux[0] == pytest.approx(1.0, rel=0.2)
    assert aux[1] is None
    assert [loss for _, loss in one.at.loss] == [e["loss"] for n, e in told if n == 0]


def test_options_of_another_routing_are_refused():
    data = {"train": {"path": "rows.jsonl"}}
    with pytest.raises(ValueError, match="top_p is of routing_strategy: mixlora-dynamic"):
        AdapterPlan(name="a", data=data, method={"type": "mixlora", "top_p": 0.5})
    with pytest.raises(ValueError, match="top_k is 5, of 4 experts"):
        AdapterPlan(name="a", data=data, method={"type": "mixlora", "top_k": 5, "num_experts": 4})


def test_without_a_feed_forward_module_there_is_nothing_to_make_experts_of():
    with pytest.raises(IncompatibleAdapters, match="nothing of the feed-forward"):
        learner(llama(), method={}, lora={"target_modules": ("q_proj",)})


def test_every_number_is_in_the_file_once():
    one = learner(llama(), method={}, lora={"use_dora": True})
    assert isinstance(one.parameters, ExpertParameters)
    native = one.parameters.native()
    assert sum(t.numel() for t in native.values()) == one.parameters.flat.numel()


def test_what_is_drawn_follows_from_the_seed_alone():
    found = []
    for state in (1, 2):
        one = learner(
            llama(), method={"jitter_noise": 0.1}, lora={"lora_dropout": 0.3}, max_steps=3
        )
        torch.manual_seed(state)
        train(base_of(llama()), [one])
        found.append(one.parameters.flat.clone())
    assert torch.equal(*found)
    other = learner(llama(), method={"jitter_noise": 0.1}, lora={"lora_dropout": 0.3}, max_steps=3)
    other.seed += 1
    train(base_of(llama()), [other])
    assert not torch.equal(found[0], other.parameters.flat)


def test_masks_differ_from_step_to_step_and_from_layer_to_layer():
    drawn = []
    for seed, name in ((1, "a"), (2, "a"), (1, "b"), (1, "a")):
        with seeded(seed, name, torch.device("cpu")):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_options_get_where_they_belong():
    switch = learner(llama(), method=SWITCH | {"act_fn": "gelu"}).parameters.mix
    assert (switch.routing.dropout, switch.routing.capacity, switch.act_fn) == (0.1, 6, "gelu")
    assert (switch.router_init_range, switch.jitter_noise) == (1.0, 0.01)
    plus = learner(llama(), method={}, lora={"loraplus_lr_ratio": 4.0, "use_dora": True})
    times = [group["times"] for group in plus.optimizer.param_groups]
    assert dict(zip(plus.parameters.parts, times, strict=True)) == {
        "a": 1, "b": 4, "magnitude": 4, "expert_a": 1, "expert_b": 4, "expert_magnitude": 4,
        "gate": 1,
    }  # fmt: skip


def test_half_precision_leaves_routers_and_magnitudes_alone(tmp_path):
    model = llama()
    one = learner(model, method={}, lora={"use_dora": True})
    write_adapter(
        tmp_path, one.parameters, model, base="tiny", base_revision=None, task_type="CAUSAL_LM",
        dtype="bfloat16",
    )  # fmt: skip
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        exact = "moe_gate" in name or "magnitude" in name
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
