"""What `lorareg compare` calls interference is what adapters lose to each other in a plain sum.

Claim: the interference of adapter 2 on adapter 1, from their factors alone, ranks pairs as the loss
does that 1's own task gains when 2 is added at full strength. It is set beside simpler and narrower
measures, and beside the same pairs scaled to equal norms.

    python benchmarks/interference.py

Two small models, four adapters each, every ordered pair, on the test rows of the first's task; the
harm is (loss of 1 + 2 - loss of 1) / (loss of the base - loss of 1): at 1, all that adapter 1 had
won is gone. The figure is Spearman's rank correlation. Nothing here is timed. It needs the folder
of real models and adapters that the tests use (``LORAREG_TEST_DATA``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import common
import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.evaluate.base import LoadedBase, load_base
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import Batch, TokenRule, encode
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.compare import compare
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import Deltas, LowRank, norm, weighted_sum

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
MODELS = ("stories260k", "babyllama105")
SKILLS = ("zog", "arr", "upper", "shakespeare")
LINE = 0.9
"""Interference from which on ``compare`` calls an adapter drowned; chosen after a first run."""


def rows_of(base: LoadedBase, file: Path, limit: int) -> list[Batch]:
    """The task's rows as the default template makes them."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()[:limit]]
    pairs = [(f"{line['input']} ", line["output"]) for line in lines]
    return base.batches(encode(base.tokenizer, pairs, TokenRule(), seq2seq=False))


def basis(factor: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns for [n, rank]."""
    return torch.linalg.qr(factor.double())[0]


def measures(one: Deltas, other: Deltas) -> common.Json:
    """Everything without data that might tell what ``other`` does to ``one``."""
    [pair] = compare([one, other])
    narrow = rows = columns = shared = 0.0
    for name in one.keys() & other.keys():
        first, second = one[name], other[name]
        u, v = basis(first.b), basis(first.a.T)
        narrow += float((u.T @ second.b.double() @ (second.a.double() @ v)).square().sum())
        rows += float((basis(second.a.T).T @ v).square().mean())
        columns += float((basis(second.b).T @ u).square().mean())
        shared += 1
    return {
        "interference": pair.interference[0],
        "ratio_of_norms": pair.norms[1] / pair.norms[0],
        "interference_in_columns_too": narrow**0.5 / pair.norms[0],
        "cosine": pair.cosine,
        "overlap_of_row_spaces": rows / shared,
        "overlap_of_column_spaces": columns / shared,
    }


def pairs_of(folder: Path, model: str, limit: int) -> list[common.Json]:
    """Every ordered pair of a model's adapters: measures, and harm as it is."""
    base = load_base(folder / "models" / model, name=model, revision=None, device="cpu")
    adapters: dict[str, dict[str, LowRank]] = {}
    for skill in SKILLS:
        place = folder / "adapters" / model / skill
        adapters[skill] = load_deltas(place, read_facts(place))
    tasks = {
        skill: rows_of(base, folder / "tasks" / "stories" / skill / "test.jsonl", limit)
        for skill in SKILLS
    }

    def loss(task: str, coefficients: Mapping[str, float]) -> float:
        parts = [adapters[name] for name in coefficients]
        with applied(base.model, weighted_sum(parts, list(coefficients.values()))):
            return score(base.model, tasks[task]).mean

    found = []
    alone = {skill: (loss(skill, {}), loss(skill, {skill: 1.0})) for skill in SKILLS}
    for one, other in itertools.permutations(SKILLS, 2):
        before, after = alone[one]
        equal = norm(adapters[one]) / norm(adapters[other])
        facts = measures(adapters[one], adapters[other])
        harm = (loss(one, {one: 1.0, other: 1.0}) - after) / (before - after)
        scaled = (loss(one, {one: 1.0, other: equal}) - after) / (before - after)
        print(
            f"{model} {one:12} with {other:12} harm {harm:7.3f}  felt {facts['interference']:.3f}"
        )
        found.append(
            {"model": model, "adapter": one, "added": other, "harm": common.rounded(harm),
             "harm_at_equal_norms": common.rounded(scaled)}
            | {name: common.rounded(value) for name, value in facts.items()}
        )  # fmt: skip
    return found


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's; equal values share their mean rank."""
    ranks = torch.tensor(
        [[sum((w < v) + (w <= v) for w in values) for v in values] for values in (x, y)],
        dtype=torch.float64,
    )
    return float(torch.corrcoef(ranks)[0, 1])


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    torch.set_num_threads(args.threads)
    folder = Path(os.environ.get("LORAREG_TEST_DATA") or BESIDE)
    if not (folder / "models").is_dir():
        raise SystemExit("no test data: LORAREG_TEST_DATA says where they are")
    environment = common.environment(("torch", "transformers"), threads=args.threads, seeds={})
    limit = 10 if args.quick else 100
    pairs = [pair for model in MODELS for pair in pairs_of(folder, model, limit)]
    names = [name for name in pairs[0] if name not in
             ("model", "adapter", "added", "harm", "harm_at_equal_norms")]  # fmt: skip
    correlations: common.Json = {}
    for target in ("harm", "harm_at_equal_norms"):
        correlations[target] = {
            name: {
                where: common.rounded(
                    correlation([p[name] for p in some], [p[target] for p in some])
                )
                for where, some in (
                    ("all", pairs),
                    *((model, [p for p in pairs if p["model"] == model]) for model in MODELS),
                )
            }
            for name in names
        }
    loud = [p for p in pairs if p["interference"] >= LINE]
    soft = [p for p in pairs if p["interference"] < LINE]
    lost = {
        f"from_{LINE}": f"{sum(p['harm'] >= 1 for p in loud)} of {len(loud)}",
        "below": f"{sum(p['harm'] >= 1 for p in soft)} of {len(soft)}",
    }
    facts: common.Json = {
        "benchmark": "interference",
        "work": {"models": MODELS, "adapters": SKILLS, "rows": limit, "pairs": len(pairs)},
        "rank_correlation": correlations,
        "pairs_that_lost_all_they_had_won": lost,
        "pairs": pairs,
        "environment": environment,
    }
    for target, of in correlations.items():
        for name, found in of.items():
            print(f"{target:20} {name:28} {found}")
    print(lost)
    common.write("interference", args, facts)


if __name__ == "__main__":
    main(common.options(__doc__, device=False).parse_args())
