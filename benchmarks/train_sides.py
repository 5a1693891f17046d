"""Both sides of ``train.py``: adapters together on one base, and one after the other in PEFT.

Bases are Llamas as they are initialised, made in memory; rows are random words. Adapter n of any
number has the same rank, learning rate, seed and rows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorahub_registry.evaluate.base import LoadedBase, adopt
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.recipes.factory import Factory
from lorahub_registry.recipes.factory_file import factory_from_mapping
from lorahub_registry.train.learner import Learner
from lorahub_registry.train.run import Run, train

RANKS, ALPHA, RATES = (8, 16, 32, 64), 16, (2e-4, 5e-4, 1e-3)
IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    dtype: str = "float32"

    @property
    def config(self) -> LlamaConfig:
        """As transformers writes it."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )


SHAPES = {
    "60M": Shape(512, 1376, 8, 8, 8, 32000),
    "1B": Shape(2048, 8192, 16, 32, 8, 128256, tied=True, dtype="bfloat16"),
    "small": Shape(256, 688, 6, 4, 4, 8000),
}


def make_base(shape: Shape, seed: int, device: str) -> LoadedBase:
    """The model as it is initialised, and a tokenizer of the words ``w0``, ``w1``, ..."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(shape.config)
    words = {f"w{i}": i for i in range(shape.vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0")
    return adopt(model.to(getattr(torch, shape.dtype)), fast, name="llama")


def factory(adapters: int, steps: int, *, base: str = "base", dora: bool = False) -> Factory:
    """So many adapters of one row a step; texts lie in ``text-N.jsonl``."""
    return factory_from_mapping(
        {
            "version": 1,
            "name": "together",
            "base": base,
            "defaults": {
                "lora": {"lora_alpha": ALPHA, "target_modules": "all-linear", "use_dora": dora},
                "training": {
                    "batch_size": 1,
                    "max_steps": steps,
                    "lr_scheduler_type": "constant",
                    "max_grad_norm": 1.0,
                },
            },
            "adapters": [
                {
                    "name": f"a{n}",
                    "lora": {"r": RANKS[n % len(RANKS)]},
                    "training": {"learning_rate": RATES[n % len(RATES)], "seed": n + 1},
                    "data": {"train": {"path": f"text-{n}.jsonl", "text": "text"}},
                }
                for n in range(adapters)
            ],
            "output": {"path": "adapters"},
        }
    )


def make_rows(count: int, tokens: int, vocabulary: int, seed: int, prompt: int) -> list[Encoded]:
    """Rows of random words; all but ``prompt`` tokens of each are learned."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, vocabulary, (count, tokens), generator=random).tolist()
    return [Encoded(row[:prompt], row[prompt:]) for row in drawn]


def make_learners(
    base: LoadedBase,
    adapters: int,
    tokens: int,
    steps: int,
    *,
    dora: bool = False,
    prompt: int = 1,
    only: int | None = None,
) -> list[Learner]:
    """Learners of ``steps`` steps of one row each; with ``only``, that one alone."""
    plans = factory(adapters, steps, dora=dora).adapters
    vocabulary = base.model.config.vocab_size
    return [
        Learner(
            n if only is None else 0,
            plan,
            base.model,
            [(row,) for row in make_rows(steps, tokens, vocabulary, 1000 + n, prompt)],
            [],
            seed=n + 1,
            vocabulary=vocabulary,
        )
        for n, plan in enumerate(plans)
        if only in (None, n)
    ]


def taken(learner: Learner) -> list[Encoded]:
    """The rows of all its steps, in the order in which it takes them."""
    found, here = [], learner.at.step
    for step in range(learner.total):
        learner.at.step = step
        [micro] = learner.micros()
        found.append(micro.items[0][0])
    learner.at.step = here
    return found


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All numbers of several tensors, float32 on the CPU."""
    return torch.cat([t.detach().float().cpu().reshape(-1) for t in tensors])


def values_of(learner: Learner) -> list[torch.Tensor]:
    """A, B and magnitude of each module, in their order."""
    factors = learner.parameters.factors.values()
    return [t for f in factors for t in (f.a, f.b, f.magnitude) if t is not None]


class Ours:
    """Learners on one base, going on from turn to turn, by what ``lorareg train`` runs.

    Attributes:
        losses: of the last step, by adapter.
    """

    def __init__(self, base: LoadedBase, learners: Sequence[Learner]) -> None:
        self._base, self._learners = base, learners
        self._run = Run()
        self.losses: dict[int, float] = {}

    def __call__(self, steps: int) -> None:
        """Every adapter takes so many steps."""
        for learner in self._learners:  # each turn is a whole run to ``train``
            learner.at.state, learner.total = "running", learner.at.step + steps
        self._run = train(self._base, self._learners, run=self._run)
        self.losses = {learner.number: learner.at.loss[-1][1] for learner in self._learners}


class Peft:
    """Stock PEFT on a copy of the base: its adapters are trained one after the other.

    They stay there from turn to turn, and the one that trains is the active one; changing it is
    not counted. The loop is the leanest there is: forward with labels, backward, clip, AdamW
    (fused, as ours), rows on the device beforehand, no mask, as nothing is padded.

    Attributes:
        losses: of the last step, by adapter.
    """

    def __init__(
        self, model: nn.Module, adapters: int, *, dora: bool, wait: Callable[[], object] | None
    ) -> None:
        self._wait = wait
        plans = factory(adapters, 1, dora=dora).adapters
        configs = {plan.name: config_of(plan.lora) for plan in plans}
        first, *others = configs
        self.model: Any = get_peft_model(
            copy.deepcopy(model), configs[first], adapter_name=first
        ).train()
        for name in others:
            self.model.add_adapter(name, configs[name])
        self._runs: list[tuple[str, list[torch.Tensor], Any, list[Any]]] = []
        self.losses: dict[int, float] = {}

    def begin(self, learners: Sequence[Learner]) -> None:
        """Start where the learners start, with their rows and learning rates."""
        self._runs = []
        for learner in learners:
            name = learner.plan.name
            values = tensors_of(self.model, name, learner)
            copied(learner, values)
            optimizer = torch.optim.AdamW(
                values, lr=learner.plan.training.learning_rate, weight_decay=0.0, fused=True
            )
            rows = [inputs_of(row, self.model.device) for row in reversed(taken(learner))]
            self._runs.append((name, values, optimizer, rows))

    def values(self, number: int) -> list[torch.Tensor]:
        """An adapter's parameters as they are now, as :func:`values_of` orders them."""
        return self._runs[number][1]

    def __call__(self, steps: int) -> common.Cost:
        """Every adapter takes so many steps, one adapter after the other."""
        wall = cpu = 0.0
        for number, (name, values, optimizer, rows) in enumerate(self._runs):
            self.model.set_adapter(name)
            now = [rows.pop() for _ in range(steps)]
            if self._wait:
                self._wait()
            began, worked = time.perf_counter(), time.process_time()
            loss = loop(self.model, values, optimizer, now)
            if self._wait:
                self._wait()
            wall += time.perf_counter() - began
            cpu += time.process_time() - worked
            self.losses[number] = loss
        return common.Cost(wall, cpu)


def config_of(lora: Any) -> LoraConfig:
    """PEFT's config of a plan's options."""
    return LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules, use_dora=lora.use_dora, task_type="CAUSAL_LM",
    )  # fmt: skip


def tensors_of(model: Any, name: str, learner: Learner) -> list[torch.Tensor]:
    """A PEFT adapter's parameters as :func:`values_of` orders them."""
    found: list[torch.Tensor] = []
    for module, factors in learner.parameters.factors.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        found += [layer.lora_A[name].weight, layer.lora_B[name].weight]
        if factors.magnitude is not None:
            found.append(layer.lora_magnitude_vector[name].weight)
    return found


@torch.no_grad()
def copied(learner: Learner, values: Sequence[torch.Tensor]) -> None:
    """Put what the learner starts from into PEFT's parameters."""
    for mine, theirs in zip(values_of(learner), values, strict=True):
        if mine.shape != theirs.shape:
            raise SystemExit(f"PEFT has {tuple(theirs.shape)} where ours is {tuple(mine.shape)}")
        theirs.copy_(mine)


def inputs_of(row: Encoded, device: Any) -> dict[str, torch.Tensor]:
    """One row as a stock loop gives it to the model."""
    labels = [IGNORED] * len(row.prompt) + list(row.output)
    return {
        "input_ids": torch.tensor([[*row.prompt, *row.output]], device=device),
        "labels": torch.tensor([labels], device=device),
    }


def loop(model: Any, values: Sequence[torch.Tensor], optimizer: Any, rows: Sequence[Any]) -> float:
    """A step a row; the last one's loss."""
    loss = torch.zeros(())
    for inputs in rows:
        loss = model(**inputs, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
    return float(loss.detach())
