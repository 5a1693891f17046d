"""Adapters trained together on one base over the same ones trained one after the other in PEFT.

Claim: eight adapters of ranks 8 to 64 on all linear modules of a Llama of 58M parameters, one row
of at most 64 tokens each a step, train at least 1.5 times as fast as one after the other in stock
PEFT; with other numbers and lengths (1 to 16 adapters, 32 to 256 tokens) never at less than 0.95
times its speed; and what comes out is the same. The base is held once: an adapter more takes what
it and its activations take, not another base.

    python benchmarks/train.py
    python benchmarks/train.py --part memory
    python benchmarks/train.py --device cuda      # a Llama of 1.2B in bfloat16; wall time counts

Sides, in one process, in turns, each going on from turn to turn:

* together: every adapter's row in one pass, as ``lorareg train`` does it;
* peft: one adapter after the other through stock PEFT, in the leanest loop (``train_sides.Peft``);
* alone (two sizes): ours with one adapter in a pass, one after the other.

All but the first token of a row are learned, so that both sides compute all logits. ``prompts``
is the same with half of a row as its prompt, whose logits ours leaves out. Both start from the
same factors, with the same rows in the same order, and the same learning rates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from train_memory import peak
from train_sides import (
    RANKS,
    SHAPES,
    Ours,
    Peft,
    Shape,
    factory,
    flat,
    make_base,
    make_learners,
    make_rows,
    values_of,
)

from lorahub_registry.api.estimate import plan_factory
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.recipes.factory_file import FactoryFile
from lorahub_registry.registry.store import Registry
from lorahub_registry.train.learner import Learner
from lorahub_registry.train.run import train

SIZES, LENGTHS = (1, 2, 4, 8, 16), (32, 64, 128, 256)
FASTER, NEVER_BELOW = 1.5, 0.95
HELD_ONCE = 0.5
"""Bases that an adapter more may take, at 64 tokens: with one for each it would be over 1."""
TOKENS_A_TURN, LARGE = 256, 512
MOST = 2048  # tokens of one pass on a CPU: 16 x 256 are two passes of 8 x 256
NEAR = {"float32": (1e-5, 1e-2), "bfloat16": (1e-2, None)}
"""How near losses (relative) and what was learned (distance over length) have to be."""


def distance(learner: Learner, other: Sequence[torch.Tensor], start: torch.Tensor) -> float:
    """How far the other's parameters are from the learner's, over how far those went."""
    mine = flat(values_of(learner))
    return float((mine - flat(other)).norm() / (mine - start).norm())


def compared(
    base: LoadedBase,
    peft: Peft,
    adapters: int,
    tokens: int,
    *,
    turns: int,
    wait: Callable[[], object] | None,
    dora: bool = False,
    prompt: int = 1,
    alone: bool = False,
) -> common.Json:
    """All sides of one size in turns."""
    steps = max(1, TOKENS_A_TURN // (adapters * tokens))
    warm = int(adapters * tokens < LARGE)  # a large one's first turn is one of three
    total = steps * (turns + warm)
    learners = make_learners(base, adapters, tokens, total, dora=dora, prompt=prompt)
    starts = [flat(values_of(learner)) for learner in learners]
    peft.begin(learners)
    ours = Ours(base, learners)
    sides: dict[str, Callable[[], object]] = {
        "together": lambda: ours(steps),
        "peft": lambda: peft(steps),
    }
    if alone:
        singles = [
            make_learners(base, adapters, tokens, total, dora=dora, prompt=prompt, only=n)
            for n in range(adapters)
        ]
        each = [Ours(base, single) for single in singles]

        def one_by_one() -> None:
            for one in each:
                one(steps)

        sides["alone"] = one_by_one
    samples = common.alternate(sides, turns=turns, warmup=warm, wait=wait)
    losses = [abs(ours.losses[n] / peft.losses[n] - 1) for n in range(adapters)]
    apart = [distance(a, peft.values(a.number), starts[a.number]) for a in learners]
    step = adapters * tokens
    facts: common.Json = {
        "adapters": adapters,
        "tokens": tokens,
        "steps_a_turn": steps,
        "times_faster": common.ratios(samples["peft"], samples["together"]),
        "tokens_per_s": {
            name: {
                "cpu": common.rounded(step * steps / statistics.median(sample.cpu)),
                "wall": common.rounded(step * steps / statistics.median(sample.wall)),
            }
            for name, sample in samples.items()
        },
        "steps": total,
        "loss_difference": common.rounded(max(losses)),
        "parameter_distance": common.rounded(max(apart)),
        "samples": {name: sample.json() for name, sample in samples.items()},
    }
    if alone:
        facts["alone_times_faster"] = common.ratios(samples["peft"], samples["alone"])
    found, speeds = facts["times_faster"], facts["tokens_per_s"]
    print(
        f"{adapters:2} x {tokens:3}{' dora' if dora else ''}{' prompts' if prompt > 1 else ''}: "
        f"cpu {found['cpu']['median']:.2f} ({found['cpu']['min']:.2f}–{found['cpu']['max']:.2f}) "
        f"wall {found['wall']['median']:.2f}  tokens/s {speeds['together']['cpu']:.0f}, PEFT "
        f"{speeds['peft']['cpu']:.0f}  loss {facts['loss_difference']:.0e} "
        f"parameters {facts['parameter_distance']:.0e}"
        + (f"  alone {facts['alone_times_faster']['cpu']['median']:.2f}" if alone else ""),
        flush=True,
    )
    return facts


def agreement(base: LoadedBase, peft: Peft, adapters: int, tokens: int, steps: int) -> common.Json:
    """A whole run of ``train`` together, each alone, and in PEFT: how far apart they end."""
    learners = make_learners(base, adapters, tokens, steps)
    starts = [flat(values_of(learner)) for learner in learners]
    peft.begin(learners)
    train(base, learners)
    peft(steps)
    apart: dict[str, list[float]] = {"peft_losses": [], "alone_losses": [], "peft": [], "alone": []}
    for n, learner in enumerate(learners):
        [single] = make_learners(base, adapters, tokens, steps, only=n)
        train(base, [single])
        mine = learner.at.loss[-1][1]
        apart["peft_losses"].append(abs(peft.losses[n] / mine - 1))
        apart["alone_losses"].append(abs(single.at.loss[-1][1] / mine - 1))
        apart["peft"].append(distance(learner, peft.values(n), starts[n]))
        apart["alone"].append(distance(learner, values_of(single), starts[n]))
    facts: common.Json = {name: common.rounded(max(found)) for name, found in apart.items()}
    facts |= {"adapters": adapters, "tokens": tokens, "steps": steps}
    print("agreement", json.dumps(facts), flush=True)
    return facts


def estimated(shape: Shape, adapters: int, tokens: int, seed: int, device: str) -> int:
    """What ``lorareg train --dry-run`` says of the memory, in bytes; files of the same sizes."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base = make_base(shape, seed, "cpu")
        base.model.save_pretrained(place / "base")
        base.tokenizer.save_pretrained(place / "base")
        plan = factory(adapters, 2, base=str(place / "base"))
        plan = plan.model_copy(update={"device": device})
        for n in range(adapters):
            rows = make_rows(2, tokens, shape.vocabulary, n, 1)
            texts = [" ".join(f"w{i}" for i in (*row.prompt, *row.output)) for row in rows]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (place / f"text-{n}.jsonl").write_text(lines)
        file = FactoryFile(plan, place / "factory.yaml", "")
        with Registry(place / "registry.sqlite") as registry:
            return int(plan_factory(file, registry=registry)["memory_bytes"])


def memory(args: argparse.Namespace, shape: str) -> common.Json:
    """Peaks of child processes, and what follows from them."""

    def of(side: str, adapters: int, tokens: int, *, on: str = shape, less: bool = False) -> Any:
        return peak(
            {
                "side": side,
                "shape": on,
                "adapters": adapters,
                "tokens": tokens,
                "checkpointing": less,
                "threads": args.threads,
                "device": args.device,
                "seed": args.seed,
            }
        )

    eight = of("together", 8, 64)
    if eight is None:
        return {"claim": {}, "runs": None}
    runs = {"together, 8 x 64": eight, "peft, 8 x 64": of("peft", 8, 64)}
    if not args.quick:
        runs["together, 4 x 64"] = of("together", 4, 64)
        runs["together, 8 x 256"] = of("together", 8, 256)
        runs["together, 8 x 256, checkpointing"] = of("together", 8, 256, less=True)
        runs["together, small, 4 x 256"] = of("together", 4, 256, on="small")
    over = {name: run["over_base_bytes"] for name, run in runs.items()}
    facts: common.Json = {"claim": {}, "runs": runs}
    base = eight["base_bytes"]
    facts["one_process_each_8_x_64_bytes"] = {
        "together": base + over["together, 8 x 64"],
        "peft_one_after_the_other": base + over["peft, 8 x 64"],
        "peft_in_8_processes_reckoned": 8 * (base + over["peft, 8 x 64"]),
    }
    if args.quick:
        return facts
    further = (over["together, 8 x 64"] - over["together, 4 x 64"]) / 4
    facts["an_adapter_more"] = {
        "bytes": round(further),
        "over_one_base": common.rounded(further / base),
    }
    facts["claim"]["an_adapter_more_over_one_base"] = common.judged(further / base, HELD_ONCE)
    facts["checkpointing_over_without"] = common.rounded(
        over["together, 8 x 256, checkpointing"] / over["together, 8 x 256"]
    )
    facts["estimate"] = {}
    for name, on, adapters, tokens in (
        ("together, 8 x 64", shape, 8, 64),
        ("together, 8 x 256", shape, 8, 256),
        ("together, small, 4 x 256", "small", 4, 256),
    ):
        told = estimated(SHAPES[on], adapters, tokens, args.seed, args.device)
        real = runs[name]["base_bytes"] + over[name]
        facts["estimate"][name] = {
            "estimated_bytes": told,
            "measured_bytes": real,
            "estimated_over_measured": common.rounded(told / real),
        }
        print(f"estimate {name}: {told / 1e6:.0f} MB, measured {real / 1e6:.0f} MB", flush=True)
    return facts


def claim(facts: common.Json, *, kind: str, dtype: str, at_256: bool) -> common.Json:
    """What was to be reached, and whether it was; more is better for the speeds."""

    def speed(cell: common.Json, least: float) -> common.Json:
        measured = cell["times_faster"][kind]["median"]
        return {"measured": measured, "to_reach": least, "reached": measured >= least}

    cells = facts["cells"]
    longest = 256 if at_256 else 64
    found: common.Json = {}
    for name, cell in cells.items():
        if cell["adapters"] == 8 and cell["tokens"] <= longest:
            found[f"times_faster_{name}"] = speed(cell, FASTER)
    for name, cell in facts["prompts"].items():
        found[f"times_faster_prompts_{name}"] = speed(cell, FASTER)
    slowest = min(cells.values(), key=lambda c: c["times_faster"][kind]["median"])
    where = f"{slowest['adapters']} x {slowest['tokens']}"
    found["slowest_of_all"] = speed(slowest, NEVER_BELOW) | {"where": where}
    near, parameters = NEAR[dtype]
    ends = facts["agreement"]
    losses = [ends["peft_losses"], ends["alone_losses"]]
    losses += [c["loss_difference"] for c in cells.values()]
    found["loss_difference"] = common.judged(max(losses), near)
    if parameters is not None:
        furthest = max(c["parameter_distance"] for c in cells.values())
        furthest = max(furthest, ends["peft"], ends["alone"])
        found["parameter_distance"] = common.judged(furthest, parameters)
    return found


def speeds(args: argparse.Namespace, shape: str) -> common.Json:
    """Agreement and speed of all sizes."""
    cuda = args.device == "cuda"
    wait = torch.cuda.synchronize if cuda else None
    base = make_base(SHAPES[shape], args.seed, args.device)
    sizes, lengths = ((1, 8), (64,)) if args.quick else (SIZES, LENGTHS)
    turns = 1 if args.quick else 3
    peft = Peft(base.model, max(sizes), dora=False, wait=wait)
    facts: common.Json = {"claim": {}}
    facts["work"] = {
        "base": f"Llama, {shape}, as it is initialised",
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "shape": vars(SHAPES[shape]),
        "ranks": RANKS,
        "target_modules": "all-linear",
        "rows_a_step_of_each": 1,
        "device": args.device,
    }
    facts["agreement"] = agreement(base, peft, 2 if args.quick else 8, 64, 3 if args.quick else 5)
    facts["cells"] = {
        f"{m} x {length}": compared(
            base,
            peft,
            m,
            length,
            turns=turns,
            wait=wait,
            alone=not args.quick and m == 8 and length in (64, 256),
        )
        for length in lengths
        for m in sizes
        if cuda or m * length <= MOST
    }
    facts["prompts"] = {"8 x 64": compared(base, peft, 8, 64, turns=turns, wait=wait, prompt=32)}
    del peft
    dora = Peft(base.model, 4, dora=True, wait=wait)
    facts["dora"] = {"4 x 64": compared(base, dora, 4, 64, turns=turns, wait=wait, dora=True)}
    kind = "wall" if cuda else "cpu"
    facts["claim"] = claim(facts, kind=kind, dtype=SHAPES[shape].dtype, at_256=cuda)
    return facts


def main(args: argparse.Namespace) -> None:
    """Measure, compare, print and write, part by part."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    shape = "1B" if args.device == "cuda" else "60M"
    parts = {"speed": speeds, "memory": memory}
    for part, measure in parts.items():
        if args.part not in (None, part):
            continue
        environment = common.environment(
            ("torch", "transformers", "peft"), threads=args.threads, seeds={"base": args.seed}
        )
        facts: common.Json = {"benchmark": f"train, {part}"} | measure(args, shape)
        facts["environment"] = environment | {"load_after": common.load()}
        for name, found in facts["claim"].items():
            print(name, found)
        common.write(f"train_{part}", args, facts)


if __name__ == "__main__":
    parser = common.options(__doc__)
    parser.add_argument("--part", choices=["speed", "memory"], help="default: both")
    main(parser.parse_args())
