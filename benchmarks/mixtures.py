"""What each way of mixing reaches on held-out rows, and what it costs.

    python benchmarks/mixtures.py

Two small story models with four adapters each (names, pirates, upper case, Shakespeare) and two
tasks: ``zog_arr`` needs two skills at once; on ``zog_upper`` the best single adapter is hard to
beat. Coefficients are learned on the first 64 training rows, at most 40 evaluations; figures are
the NLL (nats a token) of the 200 test rows, the evaluations, and seconds of CPU time with base
and adapters loaded. Ways that draw at random run with three seeds: mean, and the least and largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import common
import torch
import transformers
from tasks import ADAPTERS, MODELS, Task, stories

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.forms import Form, make_form
from lorahub_registry.compose.learn import learn
from lorahub_registry.compose.objective import Measure
from lorahub_registry.evaluate.nll import RowNLL, score
from lorahub_registry.recipes.learned import Learn, LoraHub
from lorahub_registry.runtime.apply import applied

ROWS, TASKS, SEEDS = 64, ("zog_arr", "zog_upper"), 3
WAYS: dict[str, Learn | LoraHub] = {
    "lorahub as published": LoraHub(),
    "factor NGOpt": Learn(form="factor"),
    "factor L-BFGS": Learn(form="factor", optimizer="gradient"),
    "delta NGOpt": Learn(),
    "delta CMA": Learn(optimizer="CMA"),
    "delta L-BFGS": Learn(optimizer="gradient"),
    "delta Adam": Learn(optimizer="gradient", gradient="adam"),
}
RANDOM = {"delta CMA"}


class Bench:
    """One task, loaded."""

    def __init__(self, task: Task, device: str) -> None:
        self.model = task.model().to(device)
        assert task.test is not None
        self.train, self.test = task.batches(device), task.batches(device, task.test)
        places = [(folder, read_facts(folder)) for folder in task.adapters]
        self.forms = {
            form: make_form(places, form=form, device=device) for form in ("delta", "factor")
        }

    def on_test(self, form: Form, coefficients: Sequence[float]) -> RowNLL:
        """The test rows under a mixture."""
        with applied(self.model, form.at(coefficients)):
            return score(self.model, self.test)

    def learned(self, method: Learn | LoraHub, seed: int) -> common.Json:
        """A search, and what it gives on the test rows."""
        form = self.forms[method.form]
        begin = time.process_time()
        with Measure(
            self.model, form, self.train, slopes=method.optimizer == "gradient"
        ) as measure:
            found = learn(measure, size=form.size, rows=ROWS, method=method, seed=seed)
        seconds = time.process_time() - begin
        nll = self.on_test(form, found.coefficients)
        return {
            "test_nll": round(nll.mean, 4),
            "stderr": round(nll.stderr, 4),
            "evaluations": len(found.evaluations),
            "cpu_s": common.rounded(seconds),
            "stopped": found.stop.reason,
            "coefficients": [round(c, 4) for c in found.coefficients],
        }


def table(task: Task, device: str, *, quick: bool) -> common.Json:
    """Every way on one task."""
    bench = Bench(task, device)
    n = len(ADAPTERS)
    given = {"base": [0.0] * n, "uniform average": [1 / n] * n}
    given |= {name: [float(i == j) for j in range(n)] for i, name in enumerate(ADAPTERS)}
    facts: common.Json = {}
    for name, coefficients in given.items():
        nll = bench.on_test(bench.forms["delta"], coefficients)
        facts[name] = {"test_nll": round(nll.mean, 4), "stderr": round(nll.stderr, 4)}
    bench.learned(Learn(budget=2), 0)  # imports
    bench.learned(Learn(budget=1, optimizer="gradient"), 0)
    for name, method in WAYS.items():
        if quick:
            method = method.model_copy(update={"budget": 6})
        runs = [bench.learned(method, seed) for seed in range(SEEDS if name in RANDOM else 1)]
        facts[name] = runs[0]
        if len(runs) > 1:
            scores = [run["test_nll"] for run in runs]
            facts[name] = {
                **runs[0],
                "test_nll": round(statistics.fmean(scores), 4),
                "test_nll_of_seeds": scores,
                "cpu_s": common.rounded(statistics.fmean(run["cpu_s"] for run in runs)),
            }
        print(task.name, name, {k: v for k, v in facts[name].items() if k != "stopped"}, flush=True)
    return facts


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    environment = common.environment(
        ("torch", "transformers", "nevergrad", "scipy"), threads=args.threads,
        seeds={"search": 0},
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for model in MODELS[:1] if args.quick else MODELS:
        for name in TASKS[:1] if args.quick else TASKS:
            task = stories(model, name, ROWS, divided=False, test=True)
            found[f"{model} {name}"] = table(task, args.device, quick=args.quick)
    facts: common.Json = {
        "benchmark": "mixtures",
        "work": {"rows": ROWS, "test_rows": 200, "budget": 40, "adapters": ADAPTERS},
        "tables": found,
        "environment": environment | {"load_after": common.load()},
    }
    common.write("mixtures", args, facts)


if __name__ == "__main__":
    main(common.options(__doc__).parse_args())
