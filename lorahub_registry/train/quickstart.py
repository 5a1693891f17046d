"""What the quickstart mixes, made from nothing: a tiny base, six adapters, an unseen task.

The base learns to repeat a sentence in which words change language, each adapter to change one
kind of word (see :mod:`~lorahub_registry.train.codeswitch`). It takes about half a minute of one
core.

The number of steps is fixed, so the same seed gives the same weights on the same machine. The
clock is a safety net for a machine that is much slower: where it stops the training, the result
depends on the machine's speed, which is warned of and recorded in ``training``. Give the three
functions the same seed: it also decides which sentences are kept for testing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import yaml

from lorahub_registry.evaluate.base import load_base
from lorahub_registry.evaluate.quiet import one_thread, without_bars
from lorahub_registry.progress import Progress, silent
from lorahub_registry.train import codeswitch
from lorahub_registry.train.codeswitch import SKILLS, Skill
from lorahub_registry.train.fitting import (
    Score,
    Training,
    answers,
    fit,
    scores,
    tokens,
)
from lorahub_registry.train.stacked import stack, write_adapter
from lorahub_registry.train.tiny import make_model, make_tokenizer

BASE_NAME = "quickstart-base"
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16
BASE_BATCH, ADAPTER_BATCH = 32, 16
TEST_ROWS = 100


@dataclass(frozen=True)
class BaseMade:
    """The base as written; ``score`` is how well it repeats held-out sentences."""

    name: str
    folder: Path
    parameters: int
    training: Training
    score: Score


@dataclass(frozen=True)
class AdapterMade:
    """An adapter as written, and what it and the bare base score at its own skill.

    ``training`` is that of all adapters together.
    """

    name: str
    folder: Path
    description: str
    training: Training
    score: Score
    base_score: Score


@one_thread()
def make_base(
    folder: Path,
    *,
    seed: int,
    progress: Progress = silent,
    steps: int = 200,
    clock_s: float = 45.0,
) -> BaseMade:
    """Train a tokenizer and a two-layer Llama that repeats what it is told; write both.

    The folder holds float32 safetensors, and loads through transformers' Auto classes.

    Args:
        clock_s: seconds after which the training ends, however many steps it made.
    """
    sentences = codeswitch.split(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    rows = codeswitch.echo_rows(sentences.train, seed)

    def loss() -> torch.Tensor:
        losses, _ = answers(model, *tokens(tokenizer, islice(rows, BASE_BATCH)))
        return losses.mean()

    training = fit(
        model.parameters(), loss, "Training the base", progress, steps=steps, clock_s=clock_s
    )
    held_out = islice(codeswitch.echo_rows(sentences.test, seed), TEST_ROWS)
    (score,) = scores(model, tokenizer, held_out)
    with without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return BaseMade(BASE_NAME, folder, model.num_parameters(), training, score)


@one_thread()
def make_adapters(
    base_folder: Path,
    folder: Path,
    *,
    seed: int,
    progress: Progress = silent,
    steps: int = 100,
    clock_s: float = 35.0,
) -> list[AdapterMade]:
    """Train one adapter for each skill, all at once, and write each as ``folder/<skill>``.

    Each is a folder as PEFT writes it, with a model card; its base is named, not located.

    Args:
        base_folder: what :func:`make_base` wrote.
        clock_s: seconds after which the training ends, however many steps it made.
    """
    sentences = codeswitch.split(seed)
    with without_bars():
        base = load_base(base_folder, name=BASE_NAME, device="cpu")
    model, tokenizer, count = base.model, base.tokenizer, len(SKILLS)
    test = sentences.test[:TEST_ROWS]
    held_out = [row for name in SKILLS for row in codeswitch.task_rows([name], test)]
    before = scores(model, tokenizer, held_out, shares=count)
    layers = stack(model, TARGETS, count, rank=RANK, alpha=ALPHA, seed=seed)
    streams = [codeswitch.skill_rows(name, sentences.train, seed) for name in SKILLS]

    def loss() -> torch.Tensor:
        rows = [row for stream in streams for row in islice(stream, ADAPTER_BATCH)]
        losses, _ = answers(model, *tokens(tokenizer, rows))
        # The mean over each adapter's own rows, summed over the adapters.
        return losses.mean() * count

    parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
    training = fit(
        parameters, loss, f"Training {count} adapters", progress, steps=steps, clock_s=clock_s
    )
    after = scores(model, tokenizer, held_out, shares=count)
    made = []
    for index, (skill, score, base_score) in enumerate(
        zip(SKILLS.values(), after, before, strict=True)
    ):
        place = folder / skill.name
        write_adapter(place, layers, index, alpha=ALPHA, base=BASE_NAME)
        card = _card(skill, score, base_score)
        (place / "README.md").write_text(card, encoding="utf-8")
        made.append(AdapterMade(skill.name, place, skill.description, training, score, base_score))
    return made


def make_task(folder: Path, *, seed: int) -> tuple[Path, Path]:
    """Write the unseen task as ``train.jsonl`` (64 rows) and ``test.jsonl`` (100 rows).

    No sentence of either was used in training, and they share none. Columns: input, output.
    """
    sentences = codeswitch.split(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, part in zip(paths, (sentences.learn, sentences.test[:TEST_ROWS]), strict=True):
        rows = codeswitch.task_rows(codeswitch.UNSEEN, part)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def _card(skill: Skill, score: Score, base_score: Score) -> str:
    (example,) = codeswitch.task_rows([skill.name], [(0,) * len(codeswitch.LEXICON)])
    facts = {
        "base_model": BASE_NAME,
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "language": [skill.language],
        "tags": ["lora", skill.topic, skill.language],
    }
    return (
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n"
        f"# {skill.name}\n\n{skill.description}\n\n"
        f"```text\n{example['input']} {example['output']}\n```\n\n"
        f"| {TEST_ROWS} held-out sentences | base | with this adapter |\n|---|---|---|\n"
        f"| exact match | {base_score.exact_match:.2f} | {score.exact_match:.2f} |\n"
        f"| NLL, nats per output token | {base_score.nll:.3f} | {score.nll:.3f} |\n\n"
        "Made by the quickstart of lorareg.\n"
    )
