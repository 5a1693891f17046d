"""The quickstart's base before training: a word-for-piece tokenizer and a two-layer Llama."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorahub_registry.train import codeswitch

_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"


def make_tokenizer() -> Any:
    """A byte-level BPE in which each word of the lexicon is one piece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Merging goes on until each of these is one piece. An output's first word has no space before.
    first = codeswitch.LEXICON[0][0].values()
    text = ["say: =>", *first, *(f" {word}" for word in codeswitch.vocabulary())]
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: Any, seed: int) -> Any:
    """A Llama of two layers with fresh weights; its generation ends with a full stop."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # An answer is over with its full stop; EOS is never trained.
    stop = tokenizer.convert_tokens_to_ids(".")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    return model
