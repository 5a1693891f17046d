"""Tiny random models with tokenizers, and PEFT adapters on them: made offline, the same each time.

torch, transformers and peft are imported by what needs them, so that tests without them stay quick.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# kind → (PEFT's config class, its options), on the tiny Llama.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Lora", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "same": ("Lora", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "wide": ("Lora", {"r": 6, "lora_alpha": 3, "target_modules": LINEAR}),
    "head": ("Lora", {"r": 2, "lora_alpha": 5, "target_modules": ["v_proj", "lm_head"]}),
    "rslora": (
        "Lora",
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    ),
    "patterns": (
        "Lora",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": LINEAR,
            # The first that matches counts; a pattern matches whole parts at the end of a name.
            "rank_pattern": {
                "layers.0.self_attn.q_proj": 2,
                "q_proj": 3,
                r".*\.1\.mlp\.(up|down)_proj": 5,
                "roj": 7,
            },
            "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 1, "v_proj": 12, "o_proj": 0.5},
        },
    ),
    "rslora-patterns": (
        "Lora",
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"o_proj": 3},
            "alpha_pattern": {"o_proj": 5},
        },
    ),
    "dora": ("Lora", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": True}),
    "bias": ("Lora", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "lora_only"}),
    "modules_to_save": (
        "Lora",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "embedding": (
        "Lora",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"]},
    ),
    "lora_bias": (
        "Lora",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "lora_bias": True},
    ),
    "ia3": ("IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": []}),
    "adalora": (
        "AdaLora",
        {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"]},
    ),
}
_GPT2 = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
_T5 = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
OTHERS = {"gpt2": ("Lora", _GPT2), "t5": ("Lora", _T5)}


@dataclass
class Tiny:
    """A saved tiny model: load it as often as needed, every time fresh."""

    kind: str
    folder: Path
    _made: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def _loaded(self) -> Any:
        import transformers

        kind = {"t5": transformers.AutoModelForSeq2SeqLM}.get(
            self.kind, transformers.AutoModelForCausalLM
        )
        return kind.from_pretrained(self.folder).eval()

    @property
    def name(self) -> str:
        """What adapters call it."""
        return self.folder.name

    def model(self) -> Any:
        """A fresh model, float32, in evaluation mode."""
        return copy.deepcopy(self._loaded)

    def tokenizer(self) -> Any:
        """A fresh tokenizer."""
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def base(self, dtype: Any = None) -> Any:
        """It as a :class:`LoadedBase`."""
        from lorahub_registry.evaluate.base import adopt

        model = self.model()
        return adopt(model.to(dtype) if dtype else model, self.tokenizer(), name=self.name)

    def adapter(self, kind: str) -> Path:
        """The folder of a PEFT adapter of this kind (see ``KINDS``), made once."""
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        return self._made[kind]

    def _make(self, kind: str) -> Path:
        import peft
        import torch

        cls, options = (KINDS if self.kind == "llama" else OTHERS)[kind]
        task = "SEQ_2_SEQ_LM" if self.kind == "t5" else "CAUSAL_LM"
        config = getattr(peft, f"{cls}Config")(task_type=task, **options)
        torch.manual_seed(sum(kind.encode()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about options that are odd on purpose
            model = peft.get_peft_model(self.model(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(
                    part in name for part in ("lora_", "ia3_", "modules_to_save", "q_proj.bias")
                ):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = self.folder.parent / "adapters" / kind
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    def peft(self, kind: str, *more: str) -> Any:
        """The model with stock PEFT's own loading of one or more adapters, each under its name."""
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.model(), str(self.adapter(kind)), adapter_name=kind)
        for other in more:
            model.load_adapter(str(self.adapter(other)), adapter_name=other)
        return model.eval()


def tuned_layers(model: Any, adapter: str) -> dict[str, Any]:
    """The layers of a PEFT model that an adapter sits on, by the base's names."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_A", {})
    }


def tokenizer(*, bos: bool, eos: bool) -> Any:
    """Bytes as tokens, with the special tokens that the model's family adds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: n for n, piece in enumerate([*special, *letters])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    template = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    if bos or eos:
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make(kind: str, folder: Path) -> Tiny:
    """Build a tiny model of this kind and save it with its tokenizer."""
    import torch
    import transformers as hf

    text = tokenizer(bos=kind == "llama", eos=kind == "t5")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made: Any
    torch.manual_seed(11)
    if kind == "llama":
        made = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=len(text), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                initializer_range=0.3, tie_word_embeddings=False, **ids,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        made = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=len(text), n_embd=32, n_layer=2, n_head=4, n_positions=256,
                initializer_range=0.3, **ids,
            )
        )  # fmt: skip
    else:
        made = hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=len(text), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                initializer_factor=1.0, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
    place = folder / f"tiny-{kind}"
    made.save_pretrained(place)
    text.save_pretrained(place)
    return Tiny(kind, place)


def rows(count: int, *, letters: Iterable[str] = "abcdefghij") -> list[tuple[str, str]]:
    """(prompt, output) pairs of different lengths."""
    alphabet = list(letters)
    words = [f"{letter}{other}" for letter in alphabet for other in alphabet]
    return [
        (" ".join(words[n : n + 1 + n % 5]) + " ", " ".join(words[-n - 3 : -n - 1 - n % 2]))
        for n in range(count)
    ]
