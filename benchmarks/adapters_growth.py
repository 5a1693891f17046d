"""How the cost of a candidate grows with the number of adapters: 2, 8, 32, 128.

    python benchmarks/adapters_growth.py

A T5 of 60M parameters (t5-small's shape) with adapters of rank 16 on q and v, 5 examples x 166
tokens; stories260k, where its data is at hand, with four adapters copied with noise, 5 rows. Each
number of adapters has a child process of its own, for its peak memory. Of each: seconds of CPU
time to load (files to form), of one candidate in place (factor and delta form), through the
operator, with gradient, of four candidates side by side, each; and one forward of the base beside
them, by which the ratios are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
import transformers
from safetensors.torch import load_file, save_file
from t5_modules import make_base, write_modules
from t5_trained import EXAMPLES, PROMPT_TOKENS
from tasks import DATA, Task, stories

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.forms import make_form
from lorahub_registry.compose.objective import Measure
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import Encoded

SIZES, TOGETHER = (2, 8, 32, 128), 4


def t5(seed: int, place: Path) -> Task:
    """The T5 as it is initialised, random rows, and 20 modules to make others from."""
    base = make_base(seed)
    base.save_pretrained(place / "base")
    random = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        words = torch.randint(3, base.config.vocab_size, (length - 1,), generator=random)
        return [*words.tolist(), 1]

    rows = [Encoded(text(PROMPT_TOKENS), text(3 + n)) for n in range(EXAMPLES)]
    return Task("t5", place / "base", tuple(write_modules(base, place, seed)), rows, True, True)


def copies(folders: tuple[Path, ...], count: int, place: Path, seed: int) -> tuple[Path, ...]:
    """So many adapters, each one of ``folders`` with a tenth of noise in every tensor."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        source, target = folders[n % len(folders)], place / f"adapter-{n:03}"
        tensors = load_file(source / "adapter_model.safetensors")
        noisy = {
            name: t + 0.1 * t.std() * torch.randn(t.shape, generator=random)
            for name, t in tensors.items()
        }
        target.mkdir(parents=True)
        save_file(noisy, target / "adapter_model.safetensors", metadata={"format": "pt"})
        config = (source / "adapter_config.json").read_bytes()
        (target / "adapter_config.json").write_bytes(config)
        made.append(target)
    return tuple(made)


def measured(task: Task, folders: tuple[Path, ...], *, turns: int, device: str) -> common.Json:
    """One number of adapters; called in a child."""
    model, batches = task.model().to(device), task.batches(device)
    score(model, batches)
    before, begin = common.peak_rss(), time.process_time()
    places = [(folder, read_facts(folder)) for folder in folders]
    delta = make_form(places, device=device)
    load = {"delta": time.process_time() - begin}
    begin = time.process_time()
    factor = make_form(places, form="factor", device=device)
    load["factor"] = time.process_time() - begin
    candidates = [tuple(0.5 / (1 + i) for i in range(len(folders)))] * TOGETHER

    def one(form: str, how: str, copies: int = 1) -> tuple[Measure, Callable[[], object]]:
        made = factor if form == "factor" else delta
        measure = Measure(model, made, batches, slopes=how == "gradient")
        measure.how, measure.copies = how, copies
        return measure, lambda: list(measure(candidates[:copies]))

    sides = {
        "factor in place": one("factor", "in place"),
        "delta in place": one("delta", "in place"),
        "delta operator": one("delta", "operator"),
        f"delta {TOGETHER} side by side, each": one("delta", "operator", TOGETHER),
        "factor gradient": one("factor", "gradient"),
        "delta gradient": one("delta", "gradient"),
    }
    facts: common.Json = {"load_cpu_s": {k: common.rounded(v) for k, v in load.items()}}
    losses = {}
    for name, (measure, run) in sides.items():
        share = TOGETHER if "side by side" in name else 1
        # Beside it, not in between: what is on the model would slow the base down.
        base = common.alternate({"base": lambda: score(model, batches)}, turns=turns)["base"]
        with measure:
            losses[name] = next(iter(measure(candidates[:1]))).nll
            side = common.alternate({"side": run}, turns=turns)["side"]
        seconds = common.spread(side.cpu)["median"] / share
        facts[name] = {
            "cpu_s": common.rounded(seconds),
            "over_base_forward_cpu": common.rounded(seconds / common.spread(base.cpu)["median"]),
        }
    exact = [nll for name, nll in losses.items() if name.startswith("delta")]
    facts["largest_difference_of_delta_losses"] = common.rounded(max(exact) - min(exact))
    facts["bytes_of_adapters"] = sum(
        (f / "adapter_model.safetensors").stat().st_size for f in folders
    )
    facts["peak_rss_bytes"], facts["peak_rss_bytes_before"] = common.peak_rss(), before
    return facts


def child(args: argparse.Namespace) -> None:
    """Measure one case, and print it as JSON."""
    work, count = args.one.split(":")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        task = t5(args.seed, place) if work == "t5" else stories(work, "zog_arr", 5, divided=False)
        folders = copies(task.adapters, int(count), place / "made", args.seed)
        turns = 1 if args.quick else 3
        print(json.dumps(measured(task, folders, turns=turns, device=args.device)))


def main(args: argparse.Namespace) -> None:
    """A child for each number of adapters."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    if args.one:
        child(args)
        return
    environment = common.environment(
        ("torch", "transformers", "peft"), threads=args.threads, seeds={"adapters": args.seed}
    )
    works = ["t5", *(["stories260k"] if (DATA / "models" / "stories260k").is_dir() else [])]
    found: dict[str, common.Json] = {}
    for work in works:
        for count in SIZES[:2] if args.quick else SIZES:
            command = [
                sys.executable, __file__, "--one", f"{work}:{count}", "--threads",
                str(args.threads), "--device", args.device, "--seed", str(args.seed),
                *(["--quick"] if args.quick else []),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            facts = json.loads(done.stdout.splitlines()[-1])
            found[f"{work}, {count} adapters"] = facts
            print(work, count, json.dumps(facts), flush=True)
    common.write(
        "adapters_growth",
        args,
        {
            "benchmark": "adapters_growth",
            "work": {"sizes": SIZES, "examples": EXAMPLES, "prompt_tokens": PROMPT_TOKENS},
            "found": found,
            "environment": environment | {"load_after": common.load()},
        },
    )


if __name__ == "__main__":
    parser = common.options(__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    main(parser.parse_args())
