"""X-LoRA checkpoints that PEFT saved: loaded as they were, or refused in words."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorahub_registry as lr
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, NotApplied, UnknownRef
from tests.cli.conftest import edit_config, edit_tensors, lorareg  # noqa: F401  (a fixture)

IDS = torch.tensor([[1, 40, 50, 60, 33, 71]])
CLASSIFIER = "base_model.internal_xlora_classifier.layers"
INSIDE = "base_model.lora_model.model."


@dataclass
class Made:
    """A checkpoint as PEFT saved it, what it left out, and what the model said."""

    folder: Path
    left_out: dict[str, dict[str, torch.Tensor]]
    logits: torch.Tensor

    def mend(self) -> Path:
        """Write what PEFT left out into its files."""
        for name, tensors in self.left_out.items():
            file = self.folder / name / "adapter_model.safetensors"
            save_file(load_file(file) | tensors, file)
        return self.folder


def make(kitchen, depth=2, **options):
    """An X-LoRA of the kitchen's two adapters, saved by PEFT to ``x``, with nothing in the way."""
    model = kitchen.tiny.model()
    model.config.use_cache = False
    experts = {str(n): str(kitchen / "loras" / kind) for n, kind in enumerate(("plain", "wide"))}
    torch.manual_seed(5)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=depth, xlora_size=16, adapters=experts,
        base_model_name_or_path="./tiny-llama", **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if "classifier" in name:
                tensor.add_(torch.randn_like(tensor))  # so that tokens differ in their scalings
        logits = made(input_ids=IDS).logits
    made.save_pretrained(kitchen / "x", save_embedding_layers=False)
    tensors = made.state_dict()
    wanted = {"": {k: v for k, v in tensors.items() if k.startswith(CLASSIFIER)}}
    for name in experts:
        own = {k: v for k, v in tensors.items() if f".{name}.weight" in k and "lora_" in k}
        wanted[name] = {k.replace(f".{name}.weight", ".weight"): v for k, v in own.items()}
    left_out = {
        name: {k: v.clone() for k, v in group.items() if k not in _there(kitchen / "x" / name)}
        for name, group in wanted.items()
    }
    for expert in experts.values():
        shutil.rmtree(expert)  # what is loaded has to come from its own folders
    return Made(kitchen / "x", left_out, logits)


def _there(folder):
    return load_file(folder / "adapter_model.safetensors")


def _logits(loaded):
    with torch.no_grad():
        return loaded.model(input_ids=IDS).logits


@pytest.fixture
def whole(kitchen):
    made = make(kitchen)
    made.mend()
    return made


def _load(folder):
    return lr.load(folder, base="./tiny-llama")


@pytest.mark.parametrize(
    ("depth", "options"),
    [
        (1, {}),
        (3, {}),
        (3, {"xlora_dropout_p": 0.0}),
        (2, {"layerwise_scalings": True, "top_k_lora": 1}),
    ],
)
def test_a_whole_one_says_what_it_said_when_it_was_saved(depth, options, kitchen):
    made = make(kitchen, depth, **options)
    loaded = _load(made.mend())
    assert torch.equal(_logits(loaded), made.logits)
    with torch.no_grad():
        plain = kitchen.tiny.model()(input_ids=IDS).logits
    assert (made.logits - plain).abs().max() > 0.1
    assert loaded.generate("ab cd", max_new_tokens=4) == loaded.generate("ab cd", max_new_tokens=4)


def test_experts_as_they_were_trained_on_do_as_well(kitchen):
    sources = {name: kitchen.tiny.adapter(kind) for name, kind in (("0", "plain"), ("1", "wide"))}
    made = make(kitchen)
    made.mend()
    for name, folder in sources.items():
        shutil.copytree(folder, made.folder / name, dirs_exist_ok=True)
    assert torch.equal(_logits(_load(made.folder)), made.logits)


@pytest.mark.parametrize("depth", [1, 2])
def test_peft_leaves_out_the_first_layer_and_that_is_refused(depth, kitchen):
    made = make(kitchen, depth)
    assert set(made.left_out[""]) == {f"{CLASSIFIER}.0.weight", f"{CLASSIFIER}.0.bias"}
    with pytest.raises(BrokenAdapter) as refused:
        lr.load(made.folder, base="nowhere")  # known from its files, before any base is looked for
    said = str(refused.value)
    assert f"it lacks {CLASSIFIER}.0.weight, {CLASSIFIER}.0.bias" in said
    assert "would be random" in said
    assert "PEFT 0.20 and later leave out" in refused.value.hint


def test_each_layer_of_the_classifier_is_asked_for(kitchen, whole):
    edit_tensors(whole.folder, lambda t: {k: v for k, v in t.items() if ".3.bias" not in k})
    with pytest.raises(BrokenAdapter, match=rf"it lacks {CLASSIFIER}\.3\.bias$"):
        _load(whole.folder)


def test_peft_leaves_out_layers_of_the_experts_and_that_is_refused(kitchen):
    made = make(kitchen)
    assert made.left_out["0"]
    assert all(".layers.1." in name for name in made.left_out["0"])
    assert made.left_out["1"]
    assert all(".layers.0." in name for name in made.left_out["1"])
    del made.left_out["1"]
    with pytest.raises(BrokenAdapter) as refused:
        _load(made.mend())
    said = str(refused.value)
    assert f"{Path('1/adapter_model.safetensors')}: this expert" in said
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in said
    assert "and 10 more" in said
    assert "use_trainable_adapters" in refused.value.hint


def test_an_expert_that_is_not_there_is_named(kitchen, whole):
    shutil.rmtree(whole.folder / "1")
    with pytest.raises(BrokenAdapter, match="there is none in its folder 1"):
        _load(whole.folder)
    edit_config(whole.folder, adapters=None)
    with pytest.raises(BrokenAdapter, match="names no adapters"):
        _load(whole.folder)


def test_an_expert_that_peft_would_unpickle_or_not_run_is_refused(kitchen, whole):
    edit_config(whole.folder / "1", use_dora=True)
    with pytest.raises(IncompatibleAdapters, match="x/1: it is DoRA"):
        _load(whole.folder)
    weights = whole.folder / "0/adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(IncompatibleAdapters, match="x/0: its weights are a pickle"):
        _load(whole.folder)


def test_what_peft_cannot_load_is_said(kitchen, whole):
    edit_config(whole.folder, xlora_size=8)
    with pytest.raises(NotApplied, match=r"PEFT cannot load this X-LoRA: .*size mismatch"):
        _load(whole.folder)
    edit_config(whole.folder, xlora_depth="2")
    with pytest.raises(BrokenAdapter, match="xlora_depth is '2'"):
        _load(whole.folder)


def test_a_repo_that_was_pulled(kitchen, hub, lorareg, whole):  # noqa: F811
    files = {
        p.relative_to(whole.folder).as_posix(): p.read_bytes()
        for p in whole.folder.rglob("*")
        if p.is_file() and p.name != "README.md"
    }
    hub.add_repo("me/many", files)
    with pytest.raises(UnknownRef):
        _load("me/many")
    lorareg("pull", "me/many")
    shutil.rmtree(whole.folder)
    assert torch.equal(_logits(_load("me/many")), whole.logits)


def test_it_is_indexed_as_what_it_is(kitchen, lorareg, whole):  # noqa: F811
    added = lorareg("add", "x", "--json").json
    assert [(row["name"], row["peft_type"]) for row in added] == [
        ("x", "XLORA"), ("0", "LORA"), ("1", "LORA"),
    ]  # fmt: skip
    assert {row["base"] for row in added} == {"tiny-llama"}
    assert "kind        XLORA CAUSAL_LM" in lorareg("show", "x").lines
    assert "rank        6 in " in lorareg("show", "./x/1").out


def test_a_recipe_refuses_it_by_name(kitchen, lorareg, whole):  # noqa: F811
    recipe = kitchen.recipe(
        adapters=[{"ref": "./x", "coefficient": 1}], method={"type": "linear"}
    )  # fmt: skip
    assert "Error: x: it is XLORA, and only LoRA adapters can be summed" in lorareg.fails(
        "compose", recipe
    )


def test_it_answers_beside_the_base_which_stays_what_it_was(kitchen, lorareg, whole):  # noqa: F811
    kitchen.lora("dora")
    options = ("--base", "./tiny-llama", "--max-new-tokens", "12", "--json")

    def other(tensors):  # as if saved over another base: PEFT writes such tensors over this one's
        name = f"{INSIDE}model.layers.0.mlp.down_proj.base_layer.weight"
        return tensors | {name: tensors[name] * 0}

    edit_tensors(whole.folder / "0", other)
    said = lorareg("generate", "x", "ab cd", "--against", "base,loras/dora", *options).json
    answers = {row["name"]: row["text"] for row in said}
    assert answers["x"] == _load(whole.folder).generate("ab cd", max_new_tokens=12)
    alone = lorareg("generate", "loras/dora", "ab cd", "--against", "base", *options).json
    assert [row["text"] for row in alone] == [answers["loras/dora"], answers["base"]]
    assert len(set(answers.values())) == 3


def test_what_is_not_whole_answers_nothing(kitchen, lorareg):  # noqa: F811
    made = make(kitchen)
    assert "it lacks " in lorareg.fails("generate", "x", "ab", "--base", "./tiny-llama")
    file = made.folder / "adapter_config.json"
    assert json.loads(file.read_text())["peft_version"]  # nothing was changed on the way
