"""Many adapters in one run: each as when trained alone, or as by a plain loop over stock PEFT."""

import copy
import os
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorahub_registry.evaluate.nll import token_losses
from lorahub_registry.evaluate.tokens import one_batch
from lorahub_registry.train.run import Hooks, train, undisturbed
from tests.train.making import base_of, learner, llama, t5

KINDS = [
    {"lora": {"r": 4}},
    {"lora": {"r": 8, "use_dora": True}, "batch_size": 3},
    {"lora": {"r": 2, "use_rslora": True, "target_modules": ("q_proj", "v_proj")}},
    {"lora": {"lora_dropout": 0.2, "loraplus_lr_ratio": 4.0}, "weight_decay": 0.1},
    {"lora": {"init_lora_weights": "pissa"}, "gradient_accumulation_steps": 2, "batch_size": 2},
    {"lora": {"init_lora_weights": "olora"}, "max_steps": 7, "group_by_length": True},
    {"lora": {"use_dora": True, "lora_dropout": 0.1}, "lr_scheduler_type": "cosine"},
    {"lora": {"lora_dropout": 0.4, "target_modules": ("o_proj",)}},
    {"packing": True, "batch_size": 2, "warmup_ratio": 0.3, "lr_scheduler_type": "constant"},
]


def alone(model, n, **options):
    one = learner(model, 0, data=n, **options)
    train(base_of(model), [one])
    return one


def difference(one, other):
    """How far the two ended from each other, over how far they went."""
    gone = float((one.parameters.flat - one.begun).norm())
    return float((one.parameters.flat - other.parameters.flat).norm()) / gone


@pytest.mark.parametrize("limit", [None, 3])
def test_each_adapter_becomes_what_it_becomes_alone(limit):
    model = llama()
    learners = [learner(model, n, data=n, **options) for n, options in enumerate(KINDS)]
    run = train(base_of(model), learners, max_together=limit)
    # The packed one goes alone.
    assert run.together == (limit or len(KINDS) - 1)
    assert run.rounds == max(one.total for one in learners)
    for n, (options, one) in enumerate(zip(KINDS, learners, strict=True)):
        other = alone(model, n, **options)
        assert one.at.state == "done"
        assert one.at.step == one.total == other.total
        # Padding and neighbours change the order of sums; AdamW amplifies it where gradients are
        # near nothing.
        assert difference(one, other) < 1e-3, KINDS[n]
        assert [loss for _, loss in one.at.loss] == pytest.approx(
            [loss for _, loss in other.at.loss], rel=1e-4
        )
        assert one.at.loss[-1][1] < one.at.loss[0][1]


def test_a_seq2seq_base_too():
    model = t5()
    kinds = [{"lora": {"target_modules": ("q", "v")}}, {"lora": {"r": 2, "use_dora": True}}]
    learners = [learner(model, n, data=n, **options) for n, options in enumerate(kinds)]
    train(base_of(model), learners)
    for n, (options, one) in enumerate(zip(kinds, learners, strict=True)):
        assert difference(one, alone(model, n, **options)) < 1e-3


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_plain_loop_over_stock_peft_gives_the_same(kind):
    model, options = llama(), {"batch_size": 3, "gradient_accumulation_steps": 2}
    one = learner(model, data=5, lora=kind, warmup_ratio=0.2, weight_decay=0.01, **options)
    twin = learner(model, data=5, lora=kind, warmup_ratio=0.2, weight_decay=0.01, **options)
    own = copy.deepcopy(model)
    config = LoraConfig(
        r=4, lora_alpha=16, use_dora=bool(kind), target_modules=list(one.parameters.factors)
    )
    wrapped = get_peft_model(own, config)
    with torch.no_grad():
        for name, f in one.parameters.factors.items():
            own.get_submodule(name).lora_A["default"].weight.copy_(f.a)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    while twin.running:
        micros, outputs = twin.micros(), sum(m.outputs for m in twin.micros())
        for micro in micros:
            items = [item[0] for item in micro.items]
            batch = one_batch(items, range(len(items)), 0, "cpu", seq2seq=False)
            (token_losses(wrapped, batch, sliced=True).sum() / outputs).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = twin.learning_rate()
        optimizer.step()
        optimizer.zero_grad()
        twin.at.step += 1
        twin.at.state = "done" if twin.at.step == twin.total else "running"
    train(base_of(model), [one])
    for name, f in one.parameters.factors.items():
        layer = own.get_submodule(name)
        torch.testing.assert_close(f.a, layer.lora_A["default"].weight, rtol=0, atol=2e-4)
        torch.testing.assert_close(f.b, layer.lora_B["default"].weight, rtol=0, atol=2e-4)


def test_seeds_decide_rows_and_dropout_whatever_their_size():
    model, orders, micros = llama(), set(), set()
    for seed in (0, 1, 256, 2**31):
        one = learner(model, gradient_accumulation_steps=300, batch_size=1, count=601)
        one.seed = seed
        orders.add(tuple(one._order(0)))
        for step in range(2):
            one.at.step = step
            micros |= {micro.seed for micro in one.micros()}
    assert len(orders) == 4
    assert len(micros) == 4 * 2 * 300


def test_an_adapter_s_accumulated_batches_are_never_in_memory_at_once(recorded):
    model = llama()
    memory = Small(model, 4)
    one = learner(model, count=32, batch_size=2, gradient_accumulation_steps=8)
    train(base_of(model), [one], progress=recorded)
    memory.remove()
    assert (one.at.state, recorded.warnings) == ("done", [])


def test_validation_rows_are_scored_each_epoch_where_nothing_else_is_said():
    one = learner(llama(), count=10, validation=4)
    train(base_of(llama()), [one])
    assert [step for step, _ in one.at.validation] == [3, 6]


def test_a_validation_that_is_no_number_is_no_gain():
    one = learner(llama(), eval_steps=1, early_stopping_patience=3)
    for step, nll in enumerate([float("nan"), 2.0, float("nan"), 1.0], 1):
        one.at.step = step
        one.validated(nll)
    assert one.at.best_step == 4


def test_the_base_s_own_dropout_stays_off_where_activations_are_computed_twice():
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.3,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval().requires_grad_(False)
    plain, twice = (learner(model, data=2, lora={"target_modules": ("q_proj",)}) for _ in range(2))
    train(base_of(model), [plain])
    train(base_of(model), [twice], gradient_checkpointing=True)
    assert difference(twice, plain) < 1e-4


def test_schedules_are_those_of_transformers():
    from transformers import get_scheduler

    for kind in ("linear", "cosine", "constant"):
        name = "constant_with_warmup" if kind == "constant" else kind
        one = learner(llama(), lr_scheduler_type=kind, warmup_ratio=0.25, max_steps=17)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-3)
        theirs = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=17)
        for step in range(17):
            one.at.step = step
            assert one.learning_rate() == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            theirs.step()


def test_one_that_diverges_stops_and_the_others_go_on():
    model = llama()
    learners = [
        learner(model, 0, data=1),
        learner(model, 1, data=2, learning_rate=1e30, max_grad_norm=None),
    ]
    ended = []
    train(base_of(model), learners, hooks=Hooks(finished=lambda one: ended.append(one.number)))
    assert [one.at.state for one in learners] == ["done", "diverged"]
    assert "is not finite at step" in learners[1].at.why
    assert ended == [1, 0]
    assert difference(learners[0], alone(model, 1)) < 1e-3


def test_a_loss_that_stays_blown_up_is_divergence():
    one = learner(llama(), max_steps=40)
    assert one.step(3.0)["step"] == 1
    for _ in range(9):
        one.step(50.0)
    assert one.running
    one.step(50.0)
    assert one.at.state == "diverged"
    assert one.at.why == "its loss stayed over 9.1 nats a token for 10 steps, to step 11"


def test_validation_stops_early_and_keeps_the_best():
    model = llama()
    options = {"validation": 10, "eval_steps": 2, "num_train_epochs": 30, "learning_rate": 2e-2}
    one = learner(model, data=1, count=6, early_stopping_patience=3, **options)
    logged = []
    train(base_of(model), [one], hooks=Hooks(logged=lambda _, entry: logged.append(entry)))
    nlls = dict(one.at.validation)
    assert one.at.state == "early"
    assert one.at.why == "no gain over 3 evaluations"
    assert one.at.step < one.total
    assert one.at.best_step == min(nlls, key=nlls.get) == one.at.step - 6
    assert [e["eval_nll"] for e in logged if "eval_nll" in e] == list(nlls.values())
    from lorahub_registry.runtime.grouped import Grouped
    from lorahub_registry.train.passes import Passes

    with Grouped(model, [one.parameters.factors]) as grouped:
        now = Passes(base_of(model), grouped, [one]).validation(one)
    assert now == pytest.approx(min(nlls.values()), rel=1e-5)


def test_activations_may_be_computed_twice():
    model = llama()
    options = {"lora": {"use_dora": True, "lora_dropout": 0.3}}
    plain = alone(model, 2, **options)
    one = learner(model, data=2, **options)
    twice = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: twice.append(1))
    train(base_of(model), [one], gradient_checkpointing=True)
    assert difference(one, plain) < 1e-4
    # The first look at the modules takes each layer once.
    assert len(twice) == 2 * (2 * one.total + 1)
    assert not any(module.training for module in model.modules())


class Small:
    """A memory that does not hold more than so many rows, as a hook on the model."""

    def __init__(self, model, most):
        self.most, self.failures = most, 0
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs):
        if kwargs["input_ids"].shape[0] > self.most:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def remove(self):
        self._hook.remove()


def test_where_memory_runs_out_fewer_go_together_and_later_all_again(recorded):
    model = llama()
    memory = Small(model, 10)
    learners = [learner(model, n, data=n, count=40, num_train_epochs=6) for n in range(4)]
    run = train(base_of(model), learners, progress=recorded)
    memory.remove()
    assert all(one.at.state == "done" for one in learners)
    assert run.reduced[0] == (0, 2)
    assert run.reduced[1] == (50, 2)  # it tried again
    assert "done again with at most 2 adapters" in recorded.warnings[0]
    for n, one in enumerate(learners):
        assert difference(one, alone(model, n, count=40, num_train_epochs=6)) < 1e-3


def test_one_whose_batch_does_not_fit_alone_fails_and_the_others_go_on(recorded):
    model = llama()
    memory = Small(model, 5)
    learners = [learner(model, 0, data=1), learner(model, 1, data=2, batch_size=6)]
    train(base_of(model), learners, progress=recorded)
    memory.remove()
    assert learners[0].at.state == "done"
    assert learners[1].at.state == "failed"
    assert learners[1].at.why.startswith("memory does not hold one of its batches (6 rows of")


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    model = llama()
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        train(base_of(model), [learner(model)])


def test_float16_overflow_lowers_the_scale_and_takes_the_step_again():
    one = learner(llama(), half=True)
    assert one.at.scale == 2.0**16
    one.at.scale = 4.0
    one.parameters.grad.fill_(float("inf"))
    assert one.step(2.0) is None
    assert (one.at.scale, one.at.step) == (2.0, 0)
    one.parameters.grad.fill_(0.02)
    entry = one.step(2.0)
    assert entry["grad_norm"] == pytest.approx(0.01 * one.parameters.flat.numel() ** 0.5, rel=1e-4)


def test_an_interrupt_waits_for_the_end_of_the_steps():
    reached = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(1)
        reached.append(2)
    assert reached == [1]
