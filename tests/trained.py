"""A trained adapter's folder without the training: real tensors, and facts in their real shape."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from lorahub_registry.lock import Lock, Pin
from tests import tiny

SHA = "c0ffee" + "0" * 58
DIGEST = "d" * 64
FACTORY = """version: 1
name: zog
base: ./tiny-llama
adapters:
- name: zog
  skills: [names]
  data:
    train: {path: zog.jsonl}
"""
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "factory.yaml",
         "lorareg.lock", "loss.png", "results.json", "training.jsonl"]  # fmt: skip


def split(name: str, **more: Any) -> dict[str, Any]:
    """One file of rows, as results tell of it."""
    return {
        "name": name, "sha256": SHA, "rows": 128, "tokens": 9000, "output_tokens": 5000,
        "dropped": 0, "cut": 0, **more,
    }  # fmt: skip


def measured(name: str, kind: str, nll: float | None, exact: float | None) -> dict[str, Any]:
    """One row of the table of scores."""
    return {
        "name": name, "kind": kind, "nll": nll, "nll_stderr": 0.01, "exact_match": exact,
        "exact_match_stderr": None if exact is None else 0.02, "n": 200,
    }  # fmt: skip


def results(**more: Any) -> dict[str, Any]:
    """What ``results.json`` holds of an adapter that was trained and measured."""
    return copy.deepcopy(
        {
            "kind": "trained",
            "name": "zog",
            "description": "Every name becomes Zog.",
            "skills": ["names", "translation:zog"],
            "base": {"name": "tiny-llama", "revision": None, "digest": DIGEST},
            "seq2seq": False,
            "method": "LoRA",
            "lora": {
                "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0,
                "target_modules": ["q_proj", "v_proj"], "use_rslora": False, "use_dora": False,
                "init_lora_weights": True, "loraplus_lr_ratio": None,
            },
            "training": {
                "learning_rate": 2e-4, "lr_scheduler_type": "linear", "warmup_ratio": 0.0,
                "weight_decay": 0.0, "max_grad_norm": 1.0, "batch_size": 8,
                "gradient_accumulation_steps": 2, "num_train_epochs": 3, "max_steps": None,
                "group_by_length": False, "packing": False, "eval_steps": 10,
                "early_stopping_patience": 3, "early_stopping_threshold": 0.0, "seed": None,
            },
            "objective": "supervised",
            "modules": 4,
            "parameters": 12345,
            "seed": 7,
            "data": {
                "train": split("zog.jsonl"),
                "validation": split("zog.jsonl", rows=16),
                "test": split("zog-test.jsonl", rows=200),
            },
            "tokens": {"template": "{{ input }} ", "max_length": 512, "eos": False},
            "steps": 24,
            "epochs": 3.0,
            "stopped": None,
            "best_step": None,
            "loss": [[1, 2.75], [12, 1.5], [24, 0.5]],
            "validation_loss": [[10, 1.625], [20, 0.75]],
            "test": [
                measured("base", "base", 2.5, 0.0), measured("zog", "adapter", 0.625, 0.875),
            ],
            "verdict": {"text": "beats the base by 1.88 ± 0.01 nats per output token"},
            "task": "zog-test",
            "seconds": 12.3,
            "together": 4,
            "notes": [],
            "license": "apache-2.0",
            "datasets": ["org/stories"],
            "versions": {"lorareg": "0.1", "torch": "2.13"},
            **more,
        }
    )  # fmt: skip


def lock() -> Lock:
    """What pins it."""
    data = {"train": Pin("zog.jsonl", files={"zog.jsonl": SHA})}
    return Lock("r" * 64, Pin("tiny-llama", digest=DIGEST), {}, data)


def weights(model: tiny.Tiny, folder: Path) -> Path:
    """The files that training itself writes: PEFT's, and the log of its steps."""
    shutil.copytree(model.adapter("plain"), folder)
    config = folder / "adapter_config.json"
    named = json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": model.name}
    config.write_text(json.dumps(named), "utf-8")
    (folder / "training.jsonl").write_text('{"step": 1, "loss": 2.75}\n', "utf-8")
    return folder


def adapter(model: tiny.Tiny, folder: Path, **more: Any) -> Path:
    """A whole trained adapter: weights and papers."""
    from lorahub_registry.api.papers import write_papers

    write_papers(weights(model, folder), results(**more), FACTORY, lock())
    return folder
