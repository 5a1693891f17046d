"""What the search benchmarks work on: the small real models with their adapters, and the T5."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import t5_trained
import torch
import transformers

from lorahub_registry.evaluate.tokens import IGNORED, Batch, Encoded, TokenRule, batches, encode

ADAPTERS = ("zog", "arr", "upper", "shakespeare")
MODELS = ("stories260k", "babyllama105")
DATA = Path(
    os.environ.get("LORAREG_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
)


@dataclass(frozen=True)
class Task:
    """Rows to learn from, a base, adapters.

    Attributes:
        divided: the published objective, cross-entropy over the number of rows; else the mean
            over tokens.
    """

    name: str
    base: Path
    adapters: tuple[Path, ...]
    rows: list[Encoded]
    seq2seq: bool
    divided: bool
    test: list[Encoded] | None = None

    def model(self) -> Any:
        """The base, loaded anew, float32."""
        kind = (
            transformers.AutoModelForSeq2SeqLM
            if self.seq2seq
            else transformers.AutoModelForCausalLM
        )
        model = kind.from_pretrained(self.base, dtype=torch.float32)
        return model.eval().requires_grad_(False)

    def batches(self, device: str, rows: list[Encoded] | None = None) -> list[Batch]:
        """The training rows, or others, as a search takes them."""
        return batches(rows or self.rows, pad=0, seq2seq=self.seq2seq, device=device)

    def padded(self) -> list[dict[str, torch.Tensor]]:
        """The rows as the published preprocessing leaves them: all of one length, with labels."""
        heads = [r.prompt if self.seq2seq else [*r.prompt, *r.output] for r in self.rows]
        labels = [
            r.output if self.seq2seq else [*[IGNORED] * len(r.prompt), *r.output]
            for r in self.rows
        ]  # fmt: skip
        columns = {
            "input_ids": _padded(heads, 0),
            "attention_mask": _padded([[1] * len(h) for h in heads], 0),
            "labels": _padded(labels, IGNORED),
        }
        return [{k: c[n] for k, c in columns.items()} for n in range(len(self.rows))]


def stories(model: str, task: str, rows: int, *, divided: bool, test: bool = False) -> Task:
    """The first rows of one of the story tasks, all four adapters of the model."""
    base = DATA / "models" / model
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def read(split: str, count: int | None) -> list[Encoded]:
        path = DATA / "tasks" / "stories" / task / f"{split}.jsonl"
        found = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:count]]
        pairs = [(f"{row['input']} ", row["output"]) for row in found]
        return encode(tokenizer, pairs, TokenRule(), seq2seq=False)

    return Task(
        f"{model} {task} {rows} rows {'published' if divided else 'token mean'}",
        base,
        tuple(DATA / "adapters" / model / name for name in ADAPTERS),
        read("train", rows),
        seq2seq=False,
        divided=divided,
        test=read("test", None) if test else None,
    )


def trained_t5(seed: int, cache: Path | None, *, quick: bool = False) -> list[Task]:
    """The T5 with its 20 trained modules: a task for each mixture of topics, 5 examples."""
    name = f"lorareg-t5-{seed}{'-quick' if quick else ''}"
    place = cache or Path(tempfile.gettempdir()) / name
    base, folders = t5_trained.make(place, seed, quick=quick)
    return [
        Task(f"t5 {task}", base, tuple(folders), t5_trained.task_rows(task, seed), True, True)
        for task in t5_trained.TASKS
    ]


def each(make: Callable[..., Task], names: tuple[tuple[str, str], ...], **more: Any) -> list[Task]:
    """A task for each (model, task)."""
    return [make(model, task, **more) for model, task in names]


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
