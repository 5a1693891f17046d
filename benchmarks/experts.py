"""Four skills in one mixture of rows: LoRA, DoRA, MixLoRA, MixDoRA, and experts that were there.

    python benchmarks/experts.py

stories260k (a real Llama of 260k parameters) learns the rows of four tasks together: calling
everybody Zog, sentences that end in ", arr!", upper case, Shakespeare (rows as in ``shelf.py``).
Four adapters with the same number of parameters (within 4 %) are trained five times each, from
five seeds, all twenty in one ``lorareg train`` run: the same rows, steps and learning rate. Beside
them ``lorareg compose`` makes experts of the four adapters that the data came with (the experts
frozen, or trained further), its router learned on some of the same rows. Figures are the NLL (nats
a token) of each task's 200 test rows, the mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import common
import torch
import transformers
from shelf import shakespeare_rows, story_rows, task_rows
from tasks import ADAPTERS, DATA

import lorahub_registry as lr
from lorahub_registry.api.train import train
from lorahub_registry.evaluate.base import LoadedBase, load_base
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.evaluate.tokens import TokenRule, encode
from lorahub_registry.registry.store import Registry

MODEL = "stories260k"
SEEDS, ROWS, ROUTER_ROWS = 5, 300, 40
"""Rows of each skill: to train on, and of those for the router of experts that were there."""
EXPERTS: common.Json = {"type": "mixlora", "num_experts": 4, "top_k": 2, "expert_lora": {"r": 4}}
WAYS: dict[str, common.Json] = {
    "LoRA": {"lora": {"r": 13, "lora_alpha": 26}},
    "DoRA": {"lora": {"r": 12, "lora_alpha": 24, "use_dora": True}},
    "MixLoRA": {
        "lora": {"r": 8, "lora_alpha": 16},
        "method": EXPERTS | {"expert_lora": {"r": 4, "lora_alpha": 8}},
    },
    "MixDoRA": {
        "lora": {"r": 10, "lora_alpha": 20, "use_dora": True},
        "method": EXPERTS | {"expert_lora": {"r": 3, "lora_alpha": 6}},
    },
}
"""The experts' α is twice their rank, as the others' is."""
TRAINING: common.Json = {
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "batch_size": 8,
    "max_steps": 60,
    "group_by_length": True,
}
THERE: dict[str, common.Json] = {
    "experts from adapters": {"type": "mixlora", "training": {"learning_rate": 1e-2}},
    "experts from adapters, trained on": {
        "type": "mixlora",
        "train_experts": True,
        "training": {"learning_rate": 3e-3},
    },
}
"""Rates for a base this small; chosen on other rows than the test's."""
Rows = list[dict[str, str]]


def mixed(count: int) -> Rows:
    """So many rows of each skill, in a drawn order."""
    found: Rows = []
    for skill in ADAPTERS:
        test = task_rows(skill, "test")
        rows = shakespeare_rows(test) if skill == "shakespeare" else story_rows(skill, test)
        found += rows[:count]
    random.Random(0).shuffle(found)
    return found


def write(path: Path, rows: Rows) -> str:
    """As a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class Scores:
    """What adapters score on each skill's test rows."""

    def __init__(self, base: LoadedBase, limit: int | None) -> None:
        self._base, self._batches = base, {}
        for skill in ADAPTERS:
            pairs = [(f"{r['input']} ", r["output"]) for r in task_rows(skill, "test")[:limit]]
            rows = encode(base.tokenizer, pairs, TokenRule(), seq2seq=False)
            self._batches[skill] = base.batches(rows)

    def of(self, folder: Path | None) -> dict[str, float]:
        """Skill → NLL; None: the base's."""
        if folder is None:
            return {skill: score(self._base.model, b).mean for skill, b in self._batches.items()}
        with stock_peft(self._base, folder) as model:
            return {skill: score(model, batches).mean for skill, batches in self._batches.items()}


def spread(found: list[Mapping[str, float]]) -> common.Json:
    """Mean and standard deviation over the seeds, of each skill and of their mean."""
    whole = [{**each, "mean": statistics.fmean(each.values())} for each in found]
    return {
        name: {
            "mean": round(statistics.fmean(one[name] for one in whole), 4),
            "std": round(statistics.stdev(one[name] for one in whole), 4),
        }
        for name in whole[0]
    }


def trained(
    place: Path, scores: Scores, registry: Registry, seeds: int, args: argparse.Namespace
) -> common.Json:
    """The four that are trained, all seeds in one run."""
    rows = write(place / "rows.jsonl", mixed(20 if args.quick else ROWS))
    steps = {"max_steps": 3} if args.quick else {}
    names = {f"{way.lower()}-{seed}": (way, seed) for way in WAYS for seed in range(seeds)}
    factory = {
        "version": 1,
        "name": "four-skills-at-once",
        "base": str(DATA / "models" / MODEL),
        "license": "mit",
        "adapters": [
            {
                "name": name,
                "training": TRAINING | steps | {"seed": seed},
                "data": {"train": {"path": rows}, "max_length": 512},
                **WAYS[way],
            }
            for name, (way, seed) in names.items()
        ],
        "output": {"path": "trained"},
        "device": "cpu",
    }
    path = place / "factory.yaml"
    path.write_text(json.dumps(factory), encoding="utf-8")  # YAML, too, and without anchors
    begin = time.process_time()
    made = train(path, registry=registry)
    print(f"trained {len(names)}: {time.process_time() - begin:.0f} CPU s", flush=True)
    found: common.Json = {}
    for way in WAYS:
        mine = [name for name, (other, _) in names.items() if other == way]
        found[way] = {
            "parameters": made.results[mine[0]]["parameters"],
            "nll": spread([scores.of(made.path / name) for name in mine]),
        }
        print(way, found[way], flush=True)
    return found


def composed(
    place: Path, scores: Scores, registry: Registry, seeds: int, args: argparse.Namespace
) -> common.Json:
    """Experts of the adapters that the data came with."""
    rows = write(place / "router.jsonl", mixed(10 if args.quick else ROUTER_ROWS))
    found: common.Json = {}
    steps = {"max_steps": 3} if args.quick else {}
    for way, method in THERE.items():
        each, loads = [], []
        for seed in range(seeds):
            recipe = {
                "version": 1,
                "name": "there",
                "base": str(DATA / "models" / MODEL),
                "adapters": [str(DATA / "adapters" / MODEL / name) for name in ADAPTERS],
                "method": method | {"training": method["training"] | steps},
                "data": {"train": {"path": rows}},
                "output": {"path": str(place / "there")},
                "seed": seed,
                "device": "cpu",
            }
            made = lr.compose(recipe, registry=registry, force=True)
            each.append(scores.of(made.path / "dynamic"))
            loads.append(made.results["routing"])
        found[way] = {"nll": spread(each), "routing": loads[0]}
        print(way, found[way]["nll"], flush=True)
    return found


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    seeds = 2 if args.quick else SEEDS
    environment = common.environment(
        ("torch", "transformers", "peft"), threads=args.threads, seeds={"training, from 0": seeds}
    )
    with tempfile.TemporaryDirectory() as there:
        place = Path(there)
        base = load_base(str(DATA / "models" / MODEL), name=MODEL)
        scores = Scores(base, 20 if args.quick else None)
        with Registry(place / "registry.sqlite") as registry:
            found: common.Json = {"base": {"nll": scores.of(None)}}
            found |= trained(place, scores, registry, seeds, args)
            found |= composed(place, scores, registry, seeds, args)
    common.write(
        "experts",
        args,
        {
            "benchmark": "experts",
            "work": {
                "base": MODEL,
                "rows_of_a_skill": ROWS,
                "router_rows_of_a_skill": ROUTER_ROWS,
                "test_rows_of_a_skill": 200,
                "training": TRAINING,
                "ways": WAYS,
            },
            "nll": found,
            "environment": environment | {"load_after": common.load()},
        },
    )


if __name__ == "__main__":
    main(common.options(__doc__, device=False).parse_args())
