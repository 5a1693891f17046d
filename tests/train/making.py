"""Learners on tiny models, with rows drawn from a seed."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.recipes.expert_training import MixLoraTraining
from lorahub_registry.recipes.training import LoraOptions, TrainingOptions
from lorahub_registry.train.learner import Learner, items_of

VOCABULARY = 97


class Tokenizer:
    """What a trainer asks of one."""

    pad_token_id = 0

    def __len__(self):
        return VOCABULARY


def llama(*, bias=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, dropout_rate=0.1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def base_of(model):
    return LoadedBase(model, Tokenizer(), "tiny")


def rows(count, seed, *, shortest=3, longest=20):
    """Rows whose answers can be learned: one token again and again."""
    drawn = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=drawn))

    found = []
    for _ in range(count):
        prompt = [number(1, VOCABULARY) for _ in range(number(2, 6))]
        found.append(Encoded(prompt, [1 + seed % 90] * number(shortest, longest)))
    return found


def learner(
    model, number=0, *, data=0, count=20, validation=0, lora=None, method=None, half=False,
    **training,
):  # fmt: skip
    options = {"learning_rate": 5e-3, "batch_size": 4, "num_train_epochs": 2} | training
    plan = SimpleNamespace(
        name=f"a{data}",
        lora=LoraOptions(**{"r": 4, **(lora or {})}),
        method=None
        if method is None
        else MixLoraTraining(**{"type": "mixlora", "num_experts": 4, **method}),
        training=TrainingOptions(**options),
        data=SimpleNamespace(max_length=64),
    )
    made = Learner(
        number,
        plan,
        model,
        items_of(rows(count, data), plan),
        rows(validation, data + 1000),
        seed=data + 3,
        vocabulary=VOCABULARY,
        half=half,
    )
    made.begun = made.parameters.flat.clone()
    return made
