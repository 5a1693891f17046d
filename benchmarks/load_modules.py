"""Loading 20 modules for composition takes a 20th of what one PeftModel each takes.

Claim: from 20 LoRA folders (T5 in t5-small's shape, rank 16 on q and v) to what a search sets
coefficients on takes at most 1/20 of the CPU time, at one thread, of the published way, which
loads a ``PeftModel`` of each onto the base and keeps a copy of its state dict; the tensors are the
same.

    python benchmarks/load_modules.py

Sides, in one process, in turns, from files in the system's cache, without the base's own loading:

* peft: ``PeftModel.from_pretrained`` on the base, then ``get_peft_model_state_dict`` and a deep
  copy, 20 times;
* learn: config, header and tensors read and checked, and the exact delta form laid out;
* lorahub: the same into the factor form.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import torch
from peft import PeftModel, get_peft_model_state_dict
from t5_modules import ALPHA, MODULES, RANK, make_base, write_modules
from torch import nn

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.forms import Form, make_form

TO_REACH = 1 / 20
State = dict[str, torch.Tensor]


def as_delta(folders: Sequence[Path], device: str) -> Form:
    """As ``compose`` loads for ``learn``."""
    return make_form([(folder, read_facts(folder)) for folder in folders], device=device)


def as_factors(folders: Sequence[Path], device: str) -> Form:
    """As ``compose`` loads for ``lorahub``."""
    return make_form(
        [(folder, read_facts(folder)) for folder in folders], form="factor", device=device
    )


def published(base: nn.Module, folders: Sequence[Path]) -> list[State]:
    """The published way: every module through one shared base."""
    states = []
    for folder in folders:
        model = PeftModel.from_pretrained(base, folder)
        states.append(copy.deepcopy(get_peft_model_state_dict(model)))
    return states


def same(form: Form, states: Sequence[State], scaling: float) -> int:
    """How many tensors are equal bit by bit, of each module alone; any other is an error."""
    equal = 0
    for n, state in enumerate(states):
        alone = [float(n == i) for i in range(len(states))]
        for name, delta in form.at(alone).items():
            a = state[f"base_model.model.{name}.lora_A.weight"]
            b = state[f"base_model.model.{name}.lora_B.weight"] * scaling
            # Of the exact sum, the other modules' ranks are there, times zero.
            ranks = slice(n * RANK, (n + 1) * RANK) if delta.rank > RANK else slice(None)
            if not torch.equal(delta.a[ranks], a) or not torch.equal(delta.b[:, ranks], b):
                raise SystemExit(f"{type(form).__name__}: {name} of module {n} is another")
            equal += 2
    return equal


def main(args: argparse.Namespace) -> None:
    """Check agreement, measure, print and write."""
    torch.set_num_threads(args.threads)
    wait = torch.cuda.synchronize if args.device == "cuda" else None
    seeds = {"base": args.seed, "modules": args.seed + 1}
    environment = common.environment(
        ("torch", "transformers", "peft", "safetensors"), threads=args.threads, seeds=seeds
    )
    with tempfile.TemporaryDirectory() as place:
        base = make_base(seeds["base"])
        folders = write_modules(base, Path(place), seeds["modules"])
        base.to(args.device)

        def peft() -> common.Cost:
            fresh = copy.deepcopy(base)  # the published way wraps the base it is given
            wall, cpu = time.perf_counter(), time.process_time()
            published(fresh, folders)
            return common.Cost(time.perf_counter() - wall, time.process_time() - cpu)

        sides: dict[str, Callable[[], object]] = {
            "peft": peft,
            "learn": lambda: as_delta(folders, args.device),
            "lorahub": lambda: as_factors(folders, args.device),
        }
        states = [
            {name: t.to(args.device) for name, t in state.items()}
            for state in published(copy.deepcopy(base), folders)
        ]
        forms: dict[str, Form] = {
            "learn": as_delta(folders, args.device),
            "lorahub": as_factors(folders, args.device),
        }
        equal = {name: same(form, states, ALPHA / RANK) for name, form in forms.items()}
        samples = common.alternate(sides, turns=2 if args.quick else 15, warmup=1, wait=wait)
        bytes_ = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)

    multiples = {name: common.ratios(samples[name], samples["peft"]) for name in forms}
    facts: common.Json = {
        "benchmark": "load_modules",
        "claim": {
            f"{name}_over_peft_cpu": common.judged(multiples[name]["cpu"]["median"], TO_REACH)
            for name in forms
        },
        "work": {
            "base": "T5, t5-small's shape, initialised; its own loading is not counted",
            "modules": MODULES,
            "rank": RANK,
            "tensors": sum(map(len, states)),
            "bytes": bytes_,
            "dtype": "float32",
            "device": args.device,
        },
        "multiples_of_peft": multiples,
        "samples": {name: sample.json() for name, sample in samples.items()},
        "agreement": {"tensors_equal_bit_by_bit": equal},
        "peak_rss_bytes": common.peak_rss(),
        "environment": environment | {"load_after": common.load()},
    }
    for name, sample in samples.items():
        cpu, wall = common.spread(sample.cpu)["median"], common.spread(sample.wall)["median"]
        print(f"{name:8} cpu {cpu * 1e3:8.1f} ms   wall {wall * 1e3:8.1f} ms")
    for name, found in facts["claim"].items():
        print(name, found, f"1/{1 / found['measured']:.1f}")
    print(facts["agreement"])
    common.write("load_modules", args, facts)


if __name__ == "__main__":
    main(common.options(__doc__).parse_args())
