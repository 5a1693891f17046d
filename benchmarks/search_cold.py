"""`lorareg search` answers from a cold start within 0.40 s of CPU time.

Claim: `lorareg search --base mistral-7b --skill code`, as a new process over 2,000 adapters, takes
at most 0.40 s of CPU time where importing SQLAlchemy's ORM takes 0.22 s, and imports none of
torch, transformers, peft, huggingface_hub and alembic.

    python benchmarks/search_cold.py

The installed console script runs in a child process, in turns with others that only import what
is named; user and system time are the child's own, as the system counts them. Cold means a new
interpreter: files and compiled modules are in the system's cache, as at a user's second command.
A last run under ``-X importtime`` tells what was imported, and what that took.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import common

from lorahub_registry.registry.records import (
    AdapterRecord,
    BaseRecord,
    RepoRecord,
    ScoreRecord,
    SkillRecord,
)
from lorahub_registry.registry.store import Registry

TARGET, STRETCH = 0.40, 0.25
ORM = 0.22
"""CPU seconds that importing SQLAlchemy's ORM takes on the machine that the target is meant for;
the ratio to it is what compares between machines."""
SEARCH = ("search", "--base", "mistral-7b", "--skill", "code")
NEVER = ("torch", "transformers", "peft", "huggingface_hub", "alembic")
WATCHED = (*NEVER, "sqlalchemy", "pydantic", "rich", "click", "jinja2", "yaml", "numpy")
PEERS = {
    "python": "pass",
    "click": "import click",
    "sqlalchemy": "import sqlalchemy",
    "sqlalchemy.orm": "import sqlalchemy.orm",
    "pydantic": "import pydantic",
    "huggingface_hub": "import huggingface_hub.hf_api",
}
BASES = (
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Meta-Llama-3-8B",
    "Qwen/Qwen2.5-7B",
    "google/gemma-2-9b",
)
SKILLS = ("code", "math", "chat", "sql", "function-calling", "translation:de", "summarisation")
LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)")


def adapters(count: int, seed: int) -> Iterator[AdapterRecord]:
    """Made-up adapters as a sync lists them."""
    chance = random.Random(seed)
    for n in range(count):
        rank, skills = chance.choice((8, 16, 32, 64)), chance.sample(SKILLS, 2)
        name = f"{skills[0].partition(':')[0]}-lora-{n}"
        modules = tuple(
            {"name": f"model.layers.{i}.self_attn.{side}_proj", "rank": rank, "in": 4096,
             "out": 4096, "kind": "linear"}
            for i in range(32) for side in "qv"
        )  # fmt: skip
        yield AdapterRecord(
            repo=RepoRecord(
                "hub", f"owner-{n % 300}/{name}", commit=f"{chance.getrandbits(160):040x}",
                license="apache-2.0", downloads=int(chance.paretovariate(0.8)), tags=("lora",),
            ),
            base=BaseRecord(chance.choice(BASES)),
            name=name,
            revision=f"{n:040x}",
            rank=rank,
            ranks={rank: 64},
            alpha=2.0 * rank,
            targets=("q_proj", "v_proj"),
            weights="listed",
            description=f"A LoRA for {skills[0]} and {skills[1]}, trained on set {n % 97}.",
            modules=modules,
            skills=tuple(SkillRecord(skill, "card") for skill in skills),
            scores=(ScoreRecord("humaneval", "pass@1", chance.random()),),
        )  # fmt: skip


class Child:
    """A command that runs in a child process; what it took is the child's own.

    Attributes:
        peak: the largest resident size of its runs so far, in bytes.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self._command, self._env, self.peak = command, env, 0

    def __call__(self) -> common.Cost:
        begin = time.perf_counter()
        process = subprocess.Popen(
            self._command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{Path(self._command[0]).name} {self._command[1:]} failed")
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak = max(self.peak, used.ru_maxrss * unit)
        return common.Cost(wall, used.ru_utime + used.ru_stime)


def imports(script: str, env: dict[str, str]) -> tuple[list[str], common.Json]:
    """Which of the watched packages a search imports, and where the time of imports goes."""
    command = [sys.executable, "-X", "importtime", script, *SEARCH]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = [LINE.match(line) for line in told.stderr.splitlines()]
    own = {line[3]: int(line[1]) for line in found if line}
    packages: Counter[str] = Counter()
    for name, microseconds in own.items():
        packages[_package(name)] += microseconds
    listed = [name for name in WATCHED if name in own]
    return listed, {
        "modules": len(own),
        "total_ms": common.rounded(sum(own.values()) / 1e3),
        "own_ms_by_package": {
            name: common.rounded(us / 1e3) for name, us in packages.most_common(10)
        },
        "own_ms_by_module": {
            name: common.rounded(us / 1e3) for name, us in Counter(own).most_common(15)
        },
    }


def _package(name: str) -> str:
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return "(standard library)"
    return ".".join(name.split(".")[:2]) if top in {"lorahub_registry", "sqlalchemy"} else top


def main(args: argparse.Namespace) -> None:
    """Fill a registry, measure, print and write."""
    script = shutil.which("lorareg", path=str(Path(sys.executable).parent))
    if script is None:
        raise SystemExit("lorareg is not installed beside this Python: pip install -e .")
    environment = common.environment(
        ("click", "sqlalchemy", "pydantic", "huggingface-hub"),
        threads=args.threads,
        seeds={"adapters": args.seed},
    )
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LORAREG"))}
        # Compiled modules are kept, as they are where a package is installed, but not here.
        env |= {"LORAREG_HOME": folder, "PYTHONPYCACHEPREFIX": f"{folder}/compiled"}
        with Registry(Path(folder) / "registry.sqlite") as registry:
            put = registry.put_many(adapters(200 if args.quick else 2000, args.seed))
        answer = subprocess.run(
            [script, *SEARCH, "--format", "quiet"], env=env, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        rows = len(answer.stdout.splitlines())
        if not rows:
            raise SystemExit("the search found nothing: there is nothing to measure")
        ours = Child([script, *SEARCH], env)
        sides = {"lorareg search": ours, "lorareg --version": Child([script, "--version"], env)}
        for name, code in PEERS.items():
            sides[name] = Child([sys.executable, "-c", code], env)
        samples = common.alternate(sides, turns=3 if args.quick else 21, warmup=2)
        imported, where = imports(script, env)

    search = samples["lorareg search"]
    over_orm = common.ratios(search, samples["sqlalchemy.orm"])["cpu"]["median"]
    facts: common.Json = {
        "benchmark": "search_cold",
        "claim": {
            "cpu_s": common.judged(common.spread(search.cpu)["median"], TARGET, STRETCH),
            "over_sqlalchemy_orm": common.judged(
                over_orm, common.rounded(TARGET / ORM), common.rounded(STRETCH / ORM)
            ),
            "never_imported": {
                "imported": [name for name in imported if name in NEVER],
                "reached": not set(imported) & set(NEVER),
            },
        },
        "work": {
            "command": "lorareg " + " ".join(SEARCH),
            "adapters": put.added,
            "rows": rows,
        },
        "samples": {name: sample.json() for name, sample in samples.items()},
        "multiples": {
            f"search over {name}": common.ratios(search, samples[name])
            for name in ("python", "sqlalchemy.orm")
        },
        "imported": imported,
        "import_time": where,
        "peak_rss_bytes": ours.peak,
        "environment": environment | {"load_after": common.load()},
    }
    report(facts)
    common.write("search_cold", args, facts)
    if not facts["claim"]["never_imported"]["reached"]:
        raise SystemExit(f"imported: {', '.join(facts['claim']['never_imported']['imported'])}")


def report(facts: common.Json) -> None:
    """The figures, for people."""
    for name, sample in facts["samples"].items():
        cpu, wall = sample["cpu_s"], sample["wall_s"]
        print(
            f"{name:18} cpu {cpu['median']:.3f} s ({cpu['q1']:.3f}–{cpu['q3']:.3f}, "
            f"least {cpu['min']:.3f})   wall {wall['median']:.3f} s"
        )
    for name, multiple in facts["multiples"].items():
        print(f"{name}: cpu {multiple['cpu']['median']:.2f}")
    print("imported:", ", ".join(facts["imported"]))
    print("own ms of imports:", facts["import_time"]["own_ms_by_package"])
    for name, found in facts["claim"].items():
        print(name, found)


if __name__ == "__main__":
    main(common.options(__doc__, device=False).parse_args())
