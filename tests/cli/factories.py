"""A folder with a tiny base, rows, and the factories that are written there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorahub_registry.weights.stream.part import unfinished
from tests import tiny
from tests.cli.conftest import write_rows

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
TRAINING = {"learning_rate": 0.01, "batch_size": 4, "max_steps": 6}
DATA = {
    "train": {"path": "train.jsonl"}, "test": {"path": "test.jsonl"}, "template": "{{ input }} ",
}  # fmt: skip


@dataclass(frozen=True)
class Workshop:
    """The folder one stands in: a base, its rows, its factory."""

    folder: Path
    tiny: tiny.Tiny

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def factory(self, *adapters: Mapping[str, Any], **changes: Any) -> Path:
        """A factory of these adapters, each six steps; without any, of one called zog."""
        text = {
            "version": 1,
            "name": "shelf",
            "base": f"./{self.tiny.name}",
            "defaults": {"lora": LORA, "training": TRAINING, "data": DATA},
            "adapters": [dict(a) for a in adapters] or [{"name": "zog"}],
            "output": {"path": "out"},
            "license": "apache-2.0",
            **changes,
        }
        path = self.folder / "factory.yaml"
        plain = json.loads(json.dumps(text))  # no YAML aliases for what stands twice
        path.write_text(yaml.safe_dump(plain, sort_keys=False), "utf-8")
        return path

    @property
    def out(self) -> Path:
        """Where its factories write."""
        return self.folder / "out"

    @property
    def part(self) -> Path:
        """Where that grows until it is whole."""
        return unfinished(self.out)

    def results(self, name: str = "zog") -> dict[str, Any]:
        """What an adapter's results say."""
        found: dict[str, Any] = json.loads((self.out / name / "results.json").read_text("utf-8"))
        return found

    def tensors(self, name: str = "zog") -> bytes:
        """An adapter's tensors, as they are written."""
        return (self.out / name / "adapter_model.safetensors").read_bytes()


def open_workshop(model: tiny.Tiny, folder: Path) -> Workshop:
    """A base with 16 rows to learn and 6 held out."""
    made = Workshop(folder, model)
    shutil.copytree(model.folder, made / model.name)
    rows = tiny.rows(22)
    write_rows(made / "train.jsonl", rows[:16])
    write_rows(made / "test.jsonl", rows[16:])
    return made


@pytest.fixture
def shop(tiny_llama: tiny.Tiny, tmp_path: Path) -> Workshop:
    """Everything for adapters that are trained in a blink."""
    return open_workshop(tiny_llama, tmp_path / "desk")


def nll(model: tiny.Tiny, folder: Path | None, file: Path, template: str = "{} ") -> float:
    """Nats a token of the answers in ``file``, by transformers and stock PEFT alone, row by row."""
    import torch
    from peft import PeftModel

    found, tokenizer = model.model(), model.tokenizer()
    if folder is not None:
        found = PeftModel.from_pretrained(found, str(folder)).eval()
    total, count = 0.0, 0
    for line in file.read_text("utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(template.format(row["input"]), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            if model.kind == "t5":
                answer = tokenizer(text_target=row["output"], return_tensors="pt")["input_ids"]
                logits = found(input_ids=prompt, labels=answer).logits[0]
            else:
                answer = tokenizer(
                    row["output"], add_special_tokens=False, return_tensors="pt"
                )["input_ids"]  # fmt: skip
                whole = torch.cat([prompt, answer], 1)
                logits = found(input_ids=whole).logits[0, prompt.shape[1] - 1 : -1]
        told = torch.log_softmax(logits.double(), -1).gather(1, answer[0][:, None])
        total, count = total - float(told.sum()), count + answer.shape[1]
    return total / count
