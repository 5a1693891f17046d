"""Feed-forward modules are known by their structure and by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.mixlora import MixLoraConfig
from lorahub_registry.runtime.mlp import decoder_layers, mlp_of
from lorahub_registry.runtime.moe_layer import layers_of

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = ("gate_proj", "up_proj", "down_proj")
KNOWN: dict[str, tuple[str, ...]] = {
    "Llama": GATED, "Mistral": GATED, "Qwen2": GATED, "Qwen3": GATED, "Gemma": GATED,
    "Gemma2": GATED, "Gemma3": GATED, "Granite": GATED, "Phi": ("fc1", "fc2"),
    "Phi3": ("gate_up_proj", "down_proj"), "Glm": ("gate_up_proj", "down_proj"),
    "GPT2": ("c_fc", "c_proj"), "GPTNeoX": ("dense_h_to_4h", "dense_4h_to_h"),
}  # fmt: skip


def build(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    if kind == "GPT2":
        small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 32}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**small, **more)).eval()
    config = getattr(hf, f"{'Gemma3Text' if kind == 'Gemma3' else kind}Config")
    return getattr(hf, f"{kind}ForCausalLM")(config(**SIZES, **more)).eval()


def found_in(model: Any) -> list[tuple[str, Any]]:
    place, layers = decoder_layers(model)
    return [mlp_of(layer, model, f"{place}.{i}") for i, layer in enumerate(layers)]


@pytest.mark.parametrize("state", ["float32", "bfloat16", "train", "meta"])
@pytest.mark.parametrize("kind", KNOWN)
def test_its_linear_modules_are_found(kind: str, state: str) -> None:
    model = build(kind)
    if state in {"bfloat16", "meta"}:
        model = model.bfloat16() if state == "bfloat16" else model.to("meta")
    model.train(state == "train")
    for name, mlp in found_in(model):
        assert name == "mlp"
        assert mlp.names == KNOWN[kind]
        assert mlp.gated == (len(mlp.names) == 3 or mlp.first == ("gate_up_proj",))
        assert not mlp.turned
        assert mlp.width == (16, mlp.linear(mlp.last).weight.numel() // 16)
        assert mlp.module.training == (state == "train")
        if state != "meta":
            mlp.module.eval()
            x = torch.randn(2, 5, 16).to(next(model.parameters()))
            torch.testing.assert_close(mlp.plain(x), mlp.module(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Granite"])
def test_with_biases(kind: str) -> None:
    model = build(kind, mlp_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.down_proj.bias)
        nn.init.normal_(layer.mlp.gate_proj.bias)
    assert [mlp.names for _, mlp in found_in(model)] == [GATED] * 2


@pytest.mark.parametrize("act", ["gelu_new", "relu", "silu"])
def test_its_activation_is_its_own(act: str) -> None:
    model = build("Phi", hidden_act=act)
    [(_, mlp), _] = found_in(model)
    x = torch.linspace(-3, 3, 48).view(2, 24)
    torch.testing.assert_close(mlp.between([x]), hf.activations.ACT2FN[act](x))


class Turned(nn.Module):
    """Of the first module, the second half passes the activation."""

    def __init__(self, *, turned: bool, packed: bool = False) -> None:
        super().__init__()
        self.both = Conv1D(48, 16) if packed else nn.Linear(16, 48)
        self.out = Conv1D(16, 24) if packed else nn.Linear(24, 16)
        self.act, self.turned = nn.SiLU(), turned
        for value in self.parameters():
            nn.init.normal_(value, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.both(x).chunk(2, -1)
        return self.out(self.act(two) * one if self.turned else self.act(one) * two)


class Misnamed(nn.Module):
    """``up_proj`` is what passes the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24), nn.Linear(16, 24)
        self.down_proj, self.act = nn.Linear(24, 16), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.up_proj(x)) * self.gate_proj(x))


class Other(Misnamed):
    """Computes something else with the same modules."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x


def with_mlp(module: nn.Module) -> Any:
    model = build("Llama")
    for layer in model.model.layers:
        layer.mlp = module
    return model.eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_both_orders_of_the_halves(turned: bool, packed: bool) -> None:
    [(_, mlp), _] = found_in(with_mlp(Turned(turned=turned, packed=packed)))
    assert (mlp.first, mlp.last, mlp.turned) == (("both",), "out", turned)
    assert mlp.width == (16, 24)


def test_names_do_not_decide_what_is_the_gate() -> None:
    [(_, mlp), _] = found_in(with_mlp(Misnamed()))
    assert mlp.first == ("up_proj", "gate_proj")


def test_what_computes_something_else_is_refused() -> None:
    with pytest.raises(IncompatibleAdapters, match=r"found .*mlp \(Other: gate_proj"):
        found_in(with_mlp(Other()))


def test_what_hangs_on_a_module_is_no_activation() -> None:
    # As accelerate leaves it on a module whose weights it moves.
    model = build("Llama")
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp._old_forward = layer.mlp.forward
        layer.mlp.forward = lambda x, of=layer.mlp: of.down_proj(
            nn.functional.silu(of.gate_proj(x)) * of.up_proj(x)
        )
    assert [mlp.names for _, mlp in found_in(model)] == [GATED] * 2


def test_mixture_of_experts_is_refused_with_what_it_has() -> None:
    with pytest.raises(IncompatibleAdapters, match="MixtralSparseMoeBlock") as said:
        found_in(build("Mixtral", num_local_experts=2))
    assert "dense decoders" in (said.value.hint or "")


def test_opt_is_refused_with_what_it_has() -> None:
    config = hf.OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        word_embed_proj_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.raises(IncompatibleAdapters, match=r"decoder\.layers\.0 has no feed-forward part"):
        found_in(hf.OPTForCausalLM(config).eval())


def test_an_encoder_is_refused() -> None:
    config = hf.T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(IncompatibleAdapters, match="T5ForConditionalGeneration has an encoder"):
        decoder_layers(hf.T5ForConditionalGeneration(config))


def images_and_text() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8,
              "num_attention_heads": 2, "patch_size": 4}  # fmt: skip
    config = hf.Gemma3Config(
        text_config=SIZES, vision_config=vision, mm_tokens_per_image=4, image_token_id=31,
        boi_token_id=29, eoi_token_id=30,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.Gemma3ForConditionalGeneration(config).eval()


def test_of_images_and_text_the_text_has_the_experts() -> None:
    model = images_and_text()
    place, layers = decoder_layers(model)
    assert "language_model" in place
    assert layers[0] is model.get_submodule(place)[0]
    assert len(layers) == 2
    assert [mlp.names for _, mlp in found_in(model)] == [GATED] * 2
    said = {"r": 2, "lora_alpha": 2, "num_experts": 2, "target_modules": ["q_proj", *GATED]}
    held = get_peft_model(model, MixLoraConfig(**said))
    names = [name for name, _ in layers_of(held)]
    assert len(names) == 2
    assert all("language_model" in name for name in names)
    assert not [name for name, _ in held.named_parameters() if "vision" in name and "lora_" in name]


class Functional(nn.Module):
    """Its activation is a function that nothing names."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(16, 24), nn.Linear(16, 24)
        self.w2, self._act = nn.Linear(24, 16), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self._act(self.w1(x)) * self.w3(x))


@pytest.mark.parametrize("act", [nn.functional.silu, nn.functional.gelu])
def test_an_activation_that_nothing_names(act: Any) -> None:
    model = with_mlp(Functional(act))
    model.config.hidden_act = "relu"
    with pytest.raises(IncompatibleAdapters):  # the config names another, and that one is tried
        found_in(model)
    model.config.hidden_act = ""
    [(_, mlp), _] = found_in(model)
    assert mlp.names == ("w1", "w3", "w2")
    x = torch.linspace(-3, 3, 48).view(2, 24)
    torch.testing.assert_close(mlp.act(x), act(x))


def test_lfm2_calls_silu_unnamed() -> None:
    model = build("Lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    names = [(name, mlp.names) for name, mlp in found_in(model)]
    assert names == [("feed_forward", ("w1", "w3", "w2"))] * 2


class Both(nn.Module):
    """Attention with a feed-forward's modules: gives two things."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(16, 24), nn.Linear(24, 16), nn.SiLU()

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(self.act(self.one(x))), None


def test_what_gives_no_tensor_is_passed_over() -> None:
    model = build("Llama")
    for layer in model.model.layers:
        layer.self_attn = Both()
    assert [(name, mlp.names) for name, mlp in found_in(model)] == [("mlp", GATED)] * 2
    config = hf.GPTBigCodeConfig(
        n_embd=16, n_layer=1, n_head=2, n_inner=24, vocab_size=32, n_positions=32
    )
    [(name, mlp)] = found_in(hf.GPTBigCodeForCausalLM(config).eval())
    assert (name, mlp.names, mlp.dropout) == ("mlp", ("c_fc", "c_proj"), "dropout")


def dropping(kind: str, share: float) -> Any:
    if kind == "GPT2":
        return build("GPT2", resid_pdrop=share)
    config = hf.Starcoder2Config(**SIZES, residual_dropout=share, use_bias=True)
    return hf.Starcoder2ForCausalLM(config).eval()


@pytest.mark.parametrize(("kind", "first"), [("GPT2", "c_fc"), ("Starcoder2", "c_fc")])
def test_the_bases_own_dropout_stays(kind: str, first: str) -> None:
    model = dropping(kind, 0.4)
    before = torch.get_rng_state()
    [(_, mlp), _] = found_in(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert mlp.dropout is not None
    assert found_in(dropping(kind, 0.0))[0][1].dropout is None
    said = {"r": 2, "lora_alpha": 2, "num_experts": 2, "target_modules": [first]}
    held = get_peft_model(model, MixLoraConfig(**said, lora_dropout=0.0, jitter_noise=0.0))
    layer = next(layers_of(held))[1]
    x = torch.randn(4, 50, 16)
    with torch.no_grad():
        held.eval()
        whole = layer(x)
        torch.testing.assert_close(whole, layer.base_layer(x))  # B is zero
        held.train()
        found = layer(x)
    gone = found == 0
    assert 0.3 < gone.float().mean() < 0.5
    torch.testing.assert_close(found, torch.where(gone, 0, whole / 0.6))


class Between(Misnamed):
    """Drops what stands between its modules."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(share)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act(self.up_proj(x)) * self.gate_proj(x)))


def test_dropout_elsewhere_is_refused() -> None:
    with pytest.raises(IncompatibleAdapters, match=r"layers\.0\.mlp drops .*\(dropout\)"):
        found_in(with_mlp(Between(0.3)))
    assert found_in(with_mlp(Between(0.0)))[0][1].dropout is None
