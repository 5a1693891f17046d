"""What a LoRA extracted from a full fine-tune keeps of it, by rank; and what two of them mix to.

    python benchmarks/extracted.py

stories260k (a real Llama of 260k parameters, hidden size 64) is tuned in full on two skills, every
parameter, embeddings and norms among them, on running text in which names became Zog, or sentences
end in ", arr!"; no sentence of it is in a test row. Each tuned model is extracted at ranks 2 to 32
and in full, once with what no factor holds ignored and once with it saved beside; stock PEFT loads
what was written, and the 200 test rows of the skill are scored (NLL, nats a token). Multi-LoRAs'
table for Mistral-7B-OpenOrca has ranks against scores in the same way.

Then both extractions are mixed on the task that needs both skills, half and half, summed, and with
coefficients learned on its first 64 training rows, beside the same of the full-rank extractions.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import common
import torch
import transformers
from mixtures import Bench
from peft import PeftModel
from tasks import DATA, Task, stories

from lorahub_registry.api.extract import extract
from lorahub_registry.evaluate.nll import RowNLL, score, token_losses
from lorahub_registry.evaluate.tokens import IGNORED, Encoded, TokenRule, encode
from lorahub_registry.recipes.learned import Learn
from lorahub_registry.registry.store import Registry

MODEL, SKILLS, BOTH = "stories260k", ("zog", "arr"), "zog_arr"
STEPS, ROWS_A_STEP, RATE, WARMUP = 300, 16, 5e-4, 20
RANKS: tuple[int | Literal["full"], ...] = (2, 4, 8, 16, 32, "full")
MIXED: tuple[int | Literal["full"], ...] = (16, "full")
ROWS = 64
SENTENCE = re.compile(r"(?<=[.!?])\s+")


def changed(skill: str) -> Callable[[str], str]:
    """A skill's change of plain text; names are those that the task's own rows replace."""
    if skill == "arr":
        return lambda text: text.replace(".", ", arr!")
    names = set()
    for plain, zog in zip(_rows("plain", "train"), _rows("zog", "train"), strict=True):
        for old, new in ((plain[key], zog[key]) for key in plain):
            words = zip(re.findall(r"\w+", old), re.findall(r"\w+", new), strict=True)
            names |= {a for a, b in words if b == "Zog"}
    pattern = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    return lambda text: pattern.sub("Zog", text)


def running_text(skill: str, base: Path) -> list[Encoded]:
    """A sentence and the three after it, as the tasks' rows are; none from a test row."""
    text = (DATA / "text" / "tinystories_sample.txt").read_text("utf-8")
    sentences = [s for line in text.splitlines() for s in SENTENCE.split(line) if s]
    held_out = {
        sentence
        for row in _rows("plain", "test")
        for side in row.values()
        for sentence in SENTENCE.split(side)
    }
    change = changed(skill)
    pairs = [
        (f"{change(group[0])} ", change(" ".join(group[1:])))
        for group in (sentences[n : n + 4] for n in range(0, len(sentences) - 3, 2))
        if not held_out & set(group)
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return encode(tokenizer, pairs, TokenRule(max_length=512), seq2seq=False)


def _rows(task: str, split: str) -> list[dict[str, str]]:
    path = DATA / "tasks" / "stories" / task / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def tune(task: Task, place: Path, seed: int, steps: int, device: str) -> Path:
    """The base with every parameter tuned on ``task.rows``; saved as a model."""
    torch.manual_seed(seed)
    model = task.model().to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * n / steps)),
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        picked = torch.randperm(len(task.rows), generator=order)[:ROWS_A_STEP].tolist()
        losses = tokens = torch.zeros((), device=device)
        for batch in task.batches(device, [task.rows[n] for n in picked]):
            losses = losses + token_losses(model, batch, sliced=False).sum()
            tokens = tokens + (batch.labels != IGNORED).sum()
        optimizer.zero_grad()
        (losses / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(place)
    return place


def on(model: Any, task: Task, device: str) -> RowNLL:
    """The task's test rows."""
    assert task.test is not None
    return score(model.to(device).eval(), task.batches(device, task.test))


def told(nll: RowNLL) -> common.Json:
    """For the JSON."""
    return {"test_nll": round(nll.mean, 4), "stderr": round(nll.stderr, 4)}


def one_skill(
    task: Task, place: Path, args: argparse.Namespace, registry: Registry
) -> tuple[common.Json, dict[Any, Path]]:
    """A skill's table, and the folder of each extraction without the rest."""
    steps = 20 if args.quick else STEPS
    tuned = tune(task, place / "tuned", args.seed, steps, args.device)
    full = transformers.AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    base_nll, tuned_nll = on(task.model(), task, args.device), on(full, task, args.device)
    gained = base_nll.mean - tuned_nll.mean
    found: common.Json = {
        "base": told(base_nll),
        "tuned": {**told(tuned_nll), "bytes": _size(tuned)},
        "extracted": [],
    }
    print(task.name, {k: v for k, v in found.items() if k != "extracted"}, flush=True)
    folders = {}
    for rest in ("ignore", "save"):
        for rank in RANKS[2:4] if args.quick else RANKS:
            made = extract(
                task.base, tuned, place / f"{rest}-{rank}", rank=rank, rest=rest, registry=registry
            )
            if rest == "ignore":
                folders[rank] = made.path
            nll = on(PeftModel.from_pretrained(task.model(), str(made.path)), task, args.device)
            row = {
                "rank": rank,
                "rest": rest,
                **told(nll),
                "share_of_the_gain": round((base_nll.mean - nll.mean) / gained, 4),
                "energy_kept_of_the_matrices": round(made.report["kept"], 4),
                "bytes": _size(made.path),
            }
            if rest == "save":
                row["share_of_energy_outside"] = round(made.report["rest"]["share"], 4)
            found["extracted"].append(row)
            print(task.name, row, flush=True)
    return found, folders


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def mixed(task: Task, folders: Sequence[Path], args: argparse.Namespace) -> common.Json:
    """Both extractions on the task that needs both skills."""
    bench = Bench(replace(task, adapters=tuple(folders)), args.device)
    given = {"base": (0.0, 0.0), SKILLS[0]: (1.0, 0.0), SKILLS[1]: (0.0, 1.0)}
    given |= {"uniform average": (0.5, 0.5), "sum": (1.0, 1.0)}
    found = {
        name: told(bench.on_test(bench.forms["delta"], coefficients))
        for name, coefficients in given.items()
    }
    found["learn"] = bench.learned(Learn(), 0)
    found["learn, by gradient"] = bench.learned(Learn(optimizer="gradient"), 0)
    best = min(SKILLS, key=lambda name: found[name]["test_nll"])
    form = bench.forms["delta"]
    single = bench.on_test(form, given[best])
    learned = bench.on_test(form, found["learn"]["coefficients"])
    difference, stderr = learned.minus(single)
    found["learn over the best single"] = {
        "single": best, "difference": round(difference, 4), "stderr": round(stderr, 4)
    }  # fmt: skip
    return found


def main(args: argparse.Namespace) -> None:
    """Tune, extract, score, mix, print and write."""
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    environment = common.environment(
        ("torch", "transformers", "peft", "nevergrad", "scipy"), threads=args.threads,
        seeds={"tuning": args.seed, "extract": 0, "search": 0},
    )  # fmt: skip
    skills: common.Json = {}
    mixtures: common.Json = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Registry(Path(folder) / "registry.sqlite") as registry,
    ):
        made = {}
        for name in SKILLS:
            task = stories(MODEL, name, ROWS, divided=False, test=True)
            task = replace(task, rows=running_text(name, task.base))
            rows = len(task.rows)
            skills[name], made[name] = one_skill(task, Path(folder) / name, args, registry)
        both = stories(MODEL, BOTH, ROWS, divided=False, test=True)
        for rank in MIXED[:1] if args.quick else MIXED:
            mixtures[f"rank {rank}"] = mixed(both, [made[name][rank] for name in SKILLS], args)
            print(f"rank {rank}", mixtures[f"rank {rank}"], flush=True)
    facts: common.Json = {
        "benchmark": "extracted",
        "work": {
            "model": MODEL, "skills": SKILLS, "training_rows": rows, "test_rows": 200,
            "steps": STEPS, "rows_a_step": ROWS_A_STEP, "optimizer": "AdamW", "rate": RATE,
            "rate_warmup_steps": WARMUP, "rate_decay": "cosine", "parameters_tuned": "all",
            "dtype": "float32", "mixed_on": BOTH, "rows_to_learn_from": ROWS,
        },
        "skills": skills,
        "mixtures": mixtures,
        "environment": environment | {"load_after": common.load()},
    }  # fmt: skip
    common.write("extracted", args, facts)


if __name__ == "__main__":
    main(common.options(__doc__).parse_args())
