"""A task that changes its style in mid-text: token gates against the best static mixture.

    python benchmarks/switch.py

Rows are running text of TinyStories: a sentence to start from, then four more of which the first
two call everybody Zog and the last two end in ", arr!" and leave names alone. No static mixture of
the two adapters (names, pirates) suits both halves. Gates (LoRA-Flow, one a module or one a layer)
are trained on 200 rows (of the larger model 100) with five seeds; the static mixtures learn on the
same rows without a penalty, with one coefficient an adapter, one a layer, and one a module. Arrow
and the uniform average learn nothing. Figures are the NLL (nats a token) of as many held-out rows
from another part of the text; differences are paired by row. Test rows share no sentence with
training rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch
import transformers
from shelf import changes, stories
from tasks import DATA, MODELS

import lorahub_registry as lr
from lorahub_registry.registry.store import Registry

ROWS = {"stories260k": 200, "babyllama105": 100}
SEEDS = 5
LONGEST = {"stories260k": 420, "babyllama105": 200}
"""Characters of a row, so that it fits the base's positions."""
GATED = {"stories260k": ("module", "layer"), "babyllama105": ("module",)}
"""What has a gate of its own; one a layer would take the larger model half an hour more."""
GATES: common.Json = {"learning_rate": 1e-2}
"""Ten times the published rate: the bases are a thousand times smaller."""
STATIC: dict[str, common.Json] = {
    "learned, one a model": {"type": "learn", "optimizer": "gradient", "l1": 0},
    "learned, one a layer": {
        "type": "learn",
        "optimizer": "gradient",
        "l1": 0,
        "per": "layer_group",
        "layer_groups": 256,
    },
    "learned, one a module": {"type": "learn", "optimizer": "gradient", "l1": 0, "per": "module"},
}


def rows(longest: int, count: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows, test rows), each of five sentences that no other row has."""
    change, found = changes(), []
    seen: set[str] = set()
    sentences = stories()
    for n in range(0, len(sentences) - 4, 5):
        five = sentences[n : n + 5]
        if seen.isdisjoint(five) and sum(map(len, five)) <= longest:
            seen.update(five)
            first, second = change["zog"](" ".join(five[1:3])), change["arr"](" ".join(five[3:]))
            found.append({"input": change["zog"](five[0]), "output": f"{first} {second}"})
    assert len(found) >= 2 * count
    return found[:count], found[-count:]


class Bench:
    """One model: recipes composed in a folder of their own."""

    def __init__(self, model: str, place: Path, count: int) -> None:
        self._model, self._place = model, place
        for name, part in zip(("train", "test"), rows(LONGEST[model], count), strict=True):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (place / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def composed(self, method: common.Json, seed: int = 0) -> tuple[common.Json, float]:
        """(results, CPU seconds) of one recipe."""
        recipe = {
            "version": 1,
            "name": "switch",
            "base": str(DATA / "models" / self._model),
            "adapters": [str(DATA / "adapters" / self._model / name) for name in ("zog", "arr")],
            "method": method,
            "data": {
                name: {"path": str(self._place / f"{name}.jsonl")} for name in ("train", "test")
            },
            "output": {"path": str(self._place / "out")},
            "seed": seed,
        }
        begin = time.process_time()
        with Registry(self._place / "registry.sqlite") as registry:
            made = lr.compose(recipe, registry=registry, force=True)
        return made.results, time.process_time() - begin


def nll(results: common.Json, name: str) -> float:
    """Of one row of its table."""
    return round(next(row["nll"] for row in results["test"] if row["name"] == name), 4)


def measured(model: str, count: int, seeds: int, quick: bool) -> common.Json:
    """All ways on one model."""
    found: common.Json = {}
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(model, Path(place), count)
        for way, method in STATIC.items():
            results, _ = bench.composed(method)
            if not found:
                for name in ("base", "zog", "arr", "uniform average"):
                    found[name] = nll(results, name)
            found[way] = nll(results, "mixture")
        found["arrow"] = nll(bench.composed({"type": "arrow", "top_k": 1})[0], "mixture")
        found["best_static"] = min(found[way] for way in STATIC)
        print(model, found, flush=True)
        for per in GATED[model]:
            found[f"gates, one a {per}"] = gated(bench, per, seeds, found["best_static"], quick)
            print(model, per, found[f"gates, one a {per}"], flush=True)
    return found


def gated(bench: Bench, per: str, seeds: int, best: float, quick: bool) -> common.Json:
    """Gates from each seed, beside the best static mixture's NLL."""
    training = GATES | ({"max_steps": 3} if quick else {})
    found: list[common.Json] = []
    for seed in range(seeds):
        method = {"type": "lora_flow", "per": per, "training": training}
        results, seconds = bench.composed(method, seed)
        found.append(
            {
                "nll": nll(results, "mixture"),
                "plain": nll(results, "plain LoRA with mean coefficients"),
                "verdict": results["verdict"]["text"],
                "cpu_s": common.rounded(seconds),
            }
        )
        print(per, seed, found[-1], flush=True)
    values = [each["nll"] for each in found]
    return {
        "mean": round(statistics.fmean(values), 4),
        "std": round(statistics.stdev(values), 4),
        "beat_best_static": max(values) < best,
        "seeds": found,
    }


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    environment = common.environment(
        ("torch", "transformers", "peft"), threads=args.threads, seeds={"gates, from 0": SEEDS}
    )
    models = [args.model] if args.model else list(MODELS[:1] if args.quick else MODELS)
    counts, seeds = (dict.fromkeys(models, 20), 2) if args.quick else (ROWS, SEEDS)
    found: common.Json = {}
    if args.model and (kept := common.RESULTS / "switch.json").is_file():
        found = json.loads(kept.read_text("utf-8"))["models"]
    for model in models:
        found[model] = measured(model, counts[model], seeds, args.quick)
        # After each: the larger model takes long.
        common.write(
            "switch",
            args,
            {
                "benchmark": "switch",
                "work": {"train_rows": counts, "test_rows": counts, "gates": GATES},
                "models": found,
                "environment": environment | {"load_after": common.load()},
            },
        )


if __name__ == "__main__":
    parser = common.options(__doc__, device=False)
    parser.add_argument("--model", choices=MODELS, help="this one alone; the other's figures stay")
    main(parser.parse_args())
