"""Bases that do not keep the rows of a batch apart, told by their config alone."""

import pytest
import transformers as hf

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.mixture import RowsMerged
from lorahub_registry.train.apart import check_apart

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
WIDE = SIZE | {"intermediate_size": 48, "num_key_value_heads": 2}
APART = {
    "llama": hf.LlamaConfig(**WIDE),
    "mistral": hf.MistralConfig(**WIDE, sliding_window=8),
    "gpt2": hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97),
    "t5": hf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=97,
        decoder_start_token_id=0,
    ),
    "mixtral": hf.MixtralConfig(**WIDE, num_local_experts=4),
}
OPT = hf.OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=32)
EXPERTS = hf.Qwen2MoeConfig(**WIDE, moe_intermediate_size=32, num_experts=4)


@pytest.mark.parametrize("kind", APART)
def test_what_keeps_them_apart_is_taken(kind):
    check_apart(APART[kind], {"zog": "all-linear"}, seq2seq=kind == "t5")


@pytest.mark.parametrize(
    ("config", "module"), [(OPT, r"layers\.0\.fc1"), (EXPERTS, r"shared_expert\.\w+")]
)
def test_what_does_not_is_refused_by_its_module(config, module):
    with pytest.raises(RowsMerged, match=module) as raised:
        check_apart(config, {"one": ("q_proj",), "two": "all-linear"}, seq2seq=False)
    assert raised.value.hint == "leave this module out of target_modules"
    check_apart(config, {"one": ("q_proj", "v_proj")}, seq2seq=False)


def test_a_module_that_is_not_there_is_told_with_the_adapter():
    with pytest.raises(IncompatibleAdapters, match="two: target_modules: the base has no module"):
        check_apart(APART["llama"], {"one": ("q_proj",), "two": ("query",)}, seq2seq=False)
