"""LoRAMoE and MoLA directories through PEFT: as a loop from the formulas, and back to the bytes."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import lorahub_registry.runtime  # noqa: F401
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters
from tests.mixlora import make

IDS = torch.arange(3, 17).view(2, 7)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def written(folder, strategy, **options):
    config, tensors = make(strategy, **options)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return config, tensors


def loop(model, config, tensors):
    """The formulas, expert by expert, in float64."""
    model = copy.deepcopy(model).double()
    scaling = config["lora_alpha"] / config["r"]
    wide = {name: value.double() for name, value in tensors.items()}

    def delta(x, start):
        return scaling * (x @ wide[f"{start}.lora_A.weight"].T @ wide[f"{start}.lora_B.weight"].T)

    def forward(module, key):
        def run(x):
            y = functional.linear(x, module.weight)
            if f"{key}.lora_A.weight" in wide:
                return y + delta(x, key)
            weights = (x @ wide[f"{key}.moe_gate.weight"].T).softmax(-1)
            if config["peft_type"] == "MOLA":
                kept, which = weights.topk(config["top_k"], -1)
                kept = kept / kept.sum(-1, keepdim=True)
                weights = torch.zeros_like(weights).scatter(-1, which, kept)
            for e in range(config["num_experts"]):
                y = y + weights[..., e : e + 1] * delta(x, f"{key}.experts.{e}")
            return y

        return run

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            prefix = config["peft_type"].lower()
            module.forward = forward(module, f"{prefix}.layers.{name.partition('layers.')[2]}")
    return model(IDS).logits


@pytest.mark.parametrize("strategy", ["loramoe", "mola"])
def test_a_directory_is_what_the_formulas_say(llama, strategy, tmp_path):
    config, tensors = written(tmp_path, strategy)
    model = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    wanted = loop(llama, config, tensors)
    torch.testing.assert_close(model(IDS).logits.double(), wanted, rtol=0, atol=1e-5)
    assert (model(IDS).logits - llama(IDS).logits).abs().max() > 1e-2
    one = torch.cat([model(row[None]).logits for row in IDS])
    torch.testing.assert_close(model(IDS).logits, one, rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, llama(IDS).logits)


@pytest.mark.parametrize("strategy", ["loramoe", "mola"])
def test_what_is_saved_is_what_was_read(llama, strategy, tmp_path):
    (tmp_path / "a").mkdir()
    config, tensors = written(tmp_path / "a", strategy)
    model = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "a", adapter_name="mlp")
    model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "mlp" / "adapter_model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    said = json.loads((tmp_path / "b" / "mlp" / "adapter_config.json").read_text())
    assert {**said, "target_modules": sorted(said["target_modules"])} == {
        **config, "target_modules": sorted(config["target_modules"])
    }  # fmt: skip


def test_rows_with_adapters_of_their_own(llama, tmp_path):
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        written(tmp_path / name, "mola", seed=seed)
    model = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    mixed = model(IDS, adapter_names=["b", "__base__"]).logits
    model.set_adapter("b")
    torch.testing.assert_close(mixed[:1], model(IDS[:1]).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1:], llama(IDS[1:]).logits, rtol=0, atol=1e-5)


def test_generating_with_a_cache_is_generating_without(llama, tmp_path):
    written(tmp_path, "mola")
    model = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    given = {"input_ids": IDS, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**given), model.generate(**given, use_cache=False))


@pytest.mark.parametrize("strategy", ["loramoe", "mola"])
def test_a_gate_that_is_missing(llama, strategy, tmp_path):
    config, tensors = make(strategy)
    del tensors[f"{strategy}.layers.1.mlp.up_proj.moe_gate.weight"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = copy.deepcopy(llama)
    before = [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(BrokenAdapter, match="layer 1"):
        PeftModel.from_pretrained(model, tmp_path)
    assert [(name, type(m)) for name, m in model.named_modules()] == before


def test_another_base(llama, tmp_path):
    written(tmp_path, "mola", hidden=16)
    with pytest.raises(IncompatibleAdapters, match="on this base it would be"):
        PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)


def test_what_transformers_cannot_load_is_no_base_in_disguise(llama, tmp_path):
    written(tmp_path, "loramoe")
    model = copy.deepcopy(llama)
    model.load_adapter(str(tmp_path))
    with pytest.raises(IncompatibleAdapters, match="never loaded"):
        model(IDS)


def test_two_modules_of_one_name_are_refused(llama, tmp_path):
    written(tmp_path, "mola", targets=("q_proj", "up_proj"))
    model = copy.deepcopy(llama)
    for layer in model.model.layers:
        layer.extra = nn.Module()
        layer.extra.q_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(IncompatibleAdapters, match=r"q_proj and .*q_proj have one name"):
        PeftModel.from_pretrained(model, tmp_path)
