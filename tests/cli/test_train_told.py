"""What ``train`` says of its way where nobody looks at a terminal, and of what is there already."""

from __future__ import annotations

import json
import re
import shutil
import signal

import torch
import transformers

from lorahub_registry.api import train as training
from lorahub_registry.train.learner import Learner
from tests.cli.conftest import child
from tests.cli.factories import shop  # noqa: F401

LONG = {"name": "long", "training": {"max_steps": 25}}
SHORT = {
    "name": "short",
    "training": {"max_steps": 8, "eval_steps": 4},
    "data": {"validation": 0.25},
}


def test_each_adapter_says_how_far_it_is_into_a_pipe(shop):  # noqa: F811
    shop.factory(LONG, SHORT)
    done = child("train", "factory.yaml")
    assert done.code == 0, done.err
    said = done.err.splitlines()
    steps = [re.fullmatch(r"long: step (\d+) of 25, loss \d\.\d{3}", line) for line in said]
    assert [int(m[1]) for m in steps if m] == [3, 5, 8, 10, 13, 15, 18, 20, 23]
    short = [line for line in said if line.startswith("short: step")]
    assert len(short) == 7
    assert re.fullmatch(r"short: step 5 of 8, loss \d\.\d{3}  validation \d\.\d{3}", short[4])
    [end] = [line for line in said if line.startswith("short: 8 of 8")]
    loss = json.loads((shop.out / "short/training.jsonl").read_text().splitlines()[-2])["loss"]
    nll = shop.results("short")["validation_loss"][-1][1]
    assert end == f"short: 8 of 8 steps done: loss {loss:.3f}, validation {nll:.3f}"
    # Said when it ends, not when all have.
    assert said.index(end) < said.index(next(m[0] for m in steps if m and m[1] == "10"))
    assert len([line for line in said if "steps done" in line]) == 2
    assert child("train", "factory.yaml", "--force", "--json").err.count("long: step") == 9
    quiet = child("train", "factory.yaml", "--force", "-q")
    assert (quiet.code, quiet.err) == (0, "")


def test_a_run_that_goes_on_counts_on(lorareg, shop, monkeypatch):  # noqa: F811
    shop.factory(LONG)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    step = Learner.step

    def pressed(one, loss):
        if one.at.step == 11:
            signal.raise_signal(signal.SIGINT)
        return step(one, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", pressed)
        lorareg.fails("train", "factory.yaml", code=130)
    signal.signal(signal.SIGINT, before)
    said = re.findall(r"long: step (\d+) of 25", lorareg("train", "factory.yaml").err)
    assert said == ["12", "13", "15", "18", "20", "23"]


def test_a_base_that_merges_rows_is_refused_by_a_dry_run(lorareg, shop):  # noqa: F811
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=256,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(shop / "tiny-opt")
    for path in (shop / "tiny-llama").glob("tokenizer*"):
        shutil.copy(path, shop / "tiny-opt")
    shop.factory({"name": "zog", "lora": {"target_modules": "all-linear"}}, base="./tiny-opt")
    said = lorareg.fails("train", "factory.yaml", "--dry-run")
    assert "Error: model.decoder.layers.0.fc1 gets its rows as" in said
    assert said.endswith("Hint: leave this module out of target_modules\n")
    shop.factory(base="./tiny-opt")
    assert lorareg("train", "factory.yaml", "--dry-run").out.startswith("base      tiny-opt")


def test_a_run_killed_before_its_adapters_were_entered(lorareg, shop, monkeypatch):  # noqa: F811
    shop.factory({"name": "one", "skills": ["names"]}, {"name": "two"})

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "enter", killed)
        lorareg.fails("train", "factory.yaml", code=130)
    assert sorted(p.name for p in shop.out.iterdir()) == ["lorareg.json", "one", "two"]
    assert lorareg("list", "-q").lines == []
    what = f"{shop.out} is finished, and the registry lacks one, two of it"
    hint = f"lorareg add {shop.out} enters them"
    said = lorareg.fails("train", "factory.yaml")
    assert said == f"Error: {what}\nHint: {hint}; --force trains all of them again\n"
    assert f"Warning: {what}: {hint}" in lorareg("train", "factory.yaml", "--dry-run").err
    lorareg("add", shop.out)
    assert lorareg("list", "-q").lines == ["one", "two"]
    assert "--force replaces it" in lorareg.fails("train", "factory.yaml")


def test_a_dry_run_tells_what_the_registry_has_already(lorareg, shop):  # noqa: F811
    shop.factory({"name": "one"}, {"name": "two"})
    assert "the registry has" not in lorareg("train", "factory.yaml", "--dry-run").err
    lorareg("train", "factory.yaml")
    shop.factory({"name": "one"}, {"name": "three"})
    said = lorareg("train", "factory.yaml", "--dry-run").err
    assert f"one: the registry has {shop.out / 'one'} already; it will be replaced\n" in said
    assert "three: the registry" not in said
    shop.factory({"name": "one"}, output={"path": "elsewhere"})
    said = lorareg("train", "factory.yaml", "--dry-run").err
    assert f"one: the registry has another adapter of that name, {shop.out / 'one'}\n" in said


def test_adapters_that_memory_does_not_hold_are_told(lorareg, shop, monkeypatch):  # noqa: F811
    shop.factory({"name": "one"}, {"name": "two"})
    there = []

    def full(like, **_):
        there.append(like)
        if len(there) > 2:  # the first one's gradients fit, and one of its moments
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return torch.zeros(like.shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", full)
        said = lorareg.fails("train", "factory.yaml")
    assert "Error: memory does not hold the base and 1 of 2 adapters, with gradients" in said
    assert "Hint: train fewer in one run" in said
    assert not shop.part.exists()
