"""Four skills trained together from one factory: what each reaches on its own task, and the cost.

    python benchmarks/shelf.py

stories260k (a real Llama of 260k parameters, hidden size 64) learns to call everybody Zog, to end
sentences in ", arr!", to write in upper case, and Shakespeare, in one ``lorareg train`` run. Each
one's rows are the 128 of its task and more of the same form made from running text: a sentence of
TinyStories and the three after it, a speech's first line and the next ones of Shakespeare. Text
from the first test row on is left out, and so is every row with a sentence (a line) of a test row.
The figures are the NLL (nats a token) of each task's 200 test rows, beside the base's and that of
the adapters that the data came with, which were trained elsewhere on running text; CPU seconds of
the training alone, without loading, writing and scoring. Training runs on one thread, as
``lorareg train`` does for a base this small.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import common
import torch
import transformers
import yaml
from tasks import ADAPTERS, DATA

from lorahub_registry.api.train import train
from lorahub_registry.progress import Task, silent
from lorahub_registry.registry.store import Registry

MODEL = "stories260k"
GIVEN = {"zog": 1.669, "arr": 1.466, "upper": 1.999, "shakespeare": 3.353}
"""NLL of the adapters that the data came with, on their own tasks' test rows."""
SENTENCE, SPEECH = re.compile(r"(?<=[.!?]) "), re.compile(r"\n\n+")
SPEAKER = re.compile(r"^[A-Z][\w ']*: ")
AFTER, STRIDE = 3, 2
LONGEST = {"input": 140, "output": 260}
"""Characters; the tasks' own rows keep to it, before a skill changes them, and so do ours."""
DEFAULTS: common.Json = {
    "lora": {"r": 8, "lora_alpha": 16},
    "training": {
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "batch_size": 8,
        "group_by_length": True,
        "max_steps": 40,
    },
    "data": {"max_length": 512},
}
OWN: dict[str, common.Json] = {
    # Upper case is new to the base letter by letter: more steps, of fewer rows, and LoRA+.
    "upper": {
        "lora": {"r": 16, "lora_alpha": 32, "loraplus_lr_ratio": 4},
        "training": {"batch_size": 4, "max_steps": 290},
    },
}
Rows = list[dict[str, str]]


def task_rows(task: str, split: str) -> Rows:
    """The rows that the data has."""
    path = DATA / "tasks" / "stories" / task / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def changes() -> dict[str, Callable[[str], str]]:
    """Skill → its change of plain text; names are those that the task's own rows replace."""
    names = set()
    for plain, zog in zip(task_rows("plain", "train"), task_rows("zog", "train"), strict=True):
        for old, new in ((plain[key], zog[key]) for key in plain):
            words = zip(re.findall(r"\w+", old), re.findall(r"\w+", new), strict=True)
            names |= {a for a, b in words if b == "Zog"}
    named = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    return {
        "zog": lambda text: named.sub("Zog", text),
        "arr": lambda text: text.replace(".", ", arr!"),
        "upper": str.upper,
    }


def stories() -> list[str]:
    """Sentences of running text, up to the first of a test row."""
    text = " ".join((DATA / "text" / "tinystories_sample.txt").read_text("utf-8").split())
    held_out = task_rows("plain", "test")
    text = text[: min(text.index(f"{row['input']} {row['output']}") for row in held_out)]
    return SENTENCE.split(text)


def story_rows(skill: str, test: Rows) -> Rows:
    """The task's rows, and more like them: a sentence and the next ones of running text."""
    change, sentences = changes()[skill], stories()
    rows = task_rows(skill, "train")
    for n in range(0, len(sentences) - AFTER, STRIDE):
        first, *rest = sentences[n : n + 1 + AFTER]
        row = {"input": first, "output": " ".join(rest)}
        if all(len(row[side]) <= most for side, most in LONGEST.items()):
            rows.append({side: change(text) for side, text in row.items()})
    held_out = {s for row in test for s in cut(row)}
    return [row for row in rows if held_out.isdisjoint(cut(row))]


def cut(row: dict[str, str]) -> set[str]:
    """A row's sentences, a speaker's name aside."""
    said = SPEAKER.sub("", row["input"]), row["output"]
    return {sentence.strip() for side in said for sentence in SENTENCE.split(side)}


def shakespeare_rows(test: Rows) -> Rows:
    """A speaker's line and the next ones, as the task's rows are, the task's own among them."""
    text = (DATA / "text" / "tinyshakespeare.txt").read_text("utf-8")
    found: list[tuple[dict[str, str], list[str]]] = []
    for speech in SPEECH.split(text):
        speaker, _, said = speech.strip().partition(":\n")
        lines = said.split("\n")
        for n in range(0, len(lines) - 1, AFTER):
            first, *rest = lines[n : n + 1 + AFTER]
            row = {"input": f"{speaker}: {first}", "output": " ".join(rest)}
            found.append((row, [first, *rest]))
    places = [n for n, (row, _) in enumerate(found) if row in test]
    assert len(places) >= len(test)
    lines_of_test = {line for n in places for line in found[n][1]}
    held_out = {s for row in test for s in cut(row)}
    return [
        row
        for row, lines in found[: places[0]]
        if lines_of_test.isdisjoint(lines) and held_out.isdisjoint(cut(row))
    ]


def write_rows(folder: Path, most: int | None = None) -> dict[str, int]:
    """A file of training rows and one of test rows for each skill; how many of the first."""
    counts = {}
    for skill in ADAPTERS:
        test = task_rows(skill, "test")
        rows = shakespeare_rows(test) if skill == "shakespeare" else story_rows(skill, test)
        counts[skill] = len(rows[:most])
        for name, what in ((skill, rows[:most]), (f"{skill}-test", test)):
            lines = "".join(json.dumps(row) + "\n" for row in what)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return counts


def factory(folder: Path, *, quick: bool, seed: int) -> Path:
    """The factory of all four, beside their rows; ``examples/factory.yaml`` is the same."""
    adapters = []
    for skill in ADAPTERS:
        data = {
            "train": {"path": f"{skill}.jsonl"},
            "test": {"path": f"{skill}-test.jsonl", **({"limit": 20} if quick else {})},
        }
        adapters.append({"name": skill, "data": data, **OWN.get(skill, {})})
    defaults: common.Json = DEFAULTS
    if quick:
        defaults = {**DEFAULTS, "training": {**DEFAULTS["training"], "max_steps": 3}}
        adapters = [{k: v for k, v in a.items() if k in {"name", "data"}} for a in adapters]
    whole = {
        "version": 1,
        "name": "four-skills",
        "base": str(DATA / "models" / MODEL),
        "defaults": defaults,
        "adapters": adapters,
        "output": {"path": "shelf"},
        "seed": seed,
        "device": "cpu",
    }
    path = folder / "factory.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path


class Clock:
    """CPU and wall time of the training alone: from the first adapter's bar to the last one's."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self.cpu = self.wall = 0.0

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """A bar, of which nothing is seen."""
        if unit == "step" and self._first is None:
            self._first = time.process_time(), time.perf_counter()
        with silent.task(title, total, unit) as task:
            yield task
        if unit == "step" and self._first is not None:
            self.cpu = time.process_time() - self._first[0]
            self.wall = time.perf_counter() - self._first[1]

    def say(self, text: str) -> None:
        """Nothing that a benchmark tells."""

    def warn(self, text: str) -> None:
        """What has to be known of the rows."""
        print(text, flush=True)


def told(found: common.Json) -> common.Json:
    """One adapter, for the JSON."""
    name, (base, own) = found["name"], found["test"]
    return {
        "base_nll": round(base["nll"], 4),
        "test_nll": round(own["nll"], 4),
        "stderr": round(own["nll_stderr"], 4),
        "given_adapter_nll": GIVEN[name],
        "reached": own["nll"] <= GIVEN[name],
        "method": found["method"],
        "r": found["lora"]["r"],
        "learning_rate": found["training"]["learning_rate"],
        "steps": found["steps"],
        "rows": found["data"]["train"]["rows"],
        "rows_seen": found["steps"] * found["training"]["batch_size"],
        "dropped": found["data"]["train"]["dropped"],
    }


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    environment = common.environment(
        ("torch", "transformers", "peft"), threads=args.threads, seeds={"training": args.seed}
    )
    with tempfile.TemporaryDirectory() as place:
        folder, clock = Path(place), Clock()
        counts = write_rows(folder, 200 if args.quick else None)
        path = factory(folder, quick=args.quick, seed=args.seed)
        begin = time.process_time()
        with Registry(folder / "registry.sqlite") as registry:
            made = train(path, registry=registry, progress=clock)
        whole = time.process_time() - begin
    adapters = {name: told(found) for name, found in made.results.items()}
    for name, facts in adapters.items():
        print(name, facts, flush=True)
    print(f"training: {clock.cpu:.1f} CPU seconds; with loading, writing, scoring {whole:.1f}")
    common.write(
        "shelf",
        args,
        {
            "benchmark": "shelf",
            "work": {"base": MODEL, "rows": counts, "test_rows": 200, "together": 4},
            "adapters": adapters,
            "training_cpu_s": common.rounded(clock.cpu),
            "training_wall_s": common.rounded(clock.wall),
            "whole_cpu_s": common.rounded(whole),
            "environment": environment | {"load_after": common.load()},
        },
    )


if __name__ == "__main__":
    main(common.options(__doc__, device=False).parse_args())
