"""The whole idea in two minutes: train, register, search, mix, prove, talk."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lorahub_registry.api.mix import Mixture, compose
from lorahub_registry.api.talk import BASE, generate
from lorahub_registry.api.train import train
from lorahub_registry.errors import OutputError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.records import Query
from lorahub_registry.registry.store import Registry

_BASE = "quickstart-base"
_PARTS = frozenset(
    {
        "home",
        _BASE,
        "tasks",
        "factory.yaml",
        "adapters",
        ".adapters.unfinished",  # of a quickstart that was stopped
        "recipe.yaml",
        "mixture",
    }
)
NAME = "spanish-animals-french-verbs"
FACTORY = f"""\
# lorareg train factory.yaml
version: 1
name: word-skills
base: ./{_BASE}
defaults:
  lora: {{{{r: 8, lora_alpha: 16, target_modules: all-linear}}}}
  training:
    learning_rate: 3.0e-3
    lr_scheduler_type: constant
    warmup_ratio: 0.1
    max_grad_norm: 0.3
    batch_size: 16
    num_train_epochs: 2
adapters:
{{adapters}}\
evaluate: [nll, exact_match]
max_new_tokens: 16
output: {{{{path: adapters}}}}
license: apache-2.0
seed: {{seed}}
device: cpu
"""
ADAPTER = """\
  - name: {name}
    skills: [{skills}]
    description: {description}
    data:
      train: {{path: tasks/{name}/train.jsonl}}
      test: {{path: tasks/{name}/test.jsonl}}
"""
RECIPE = f"""\
# lorareg compose recipe.yaml
version: 1
name: {NAME}
base: ./{_BASE}
adapters: [{{adapters}}]
method: {{{{type: learn, budget: 40}}}}
data:
  train: {{{{path: tasks/{{task}}/train.jsonl}}}}
  test: {{{{path: tasks/{{task}}/test.jsonl}}}}
evaluate: [nll, exact_match]
max_new_tokens: 16
output: {{{{path: mixture, rank: full}}}}
license: apache-2.0
seed: {{seed}}
device: cpu
"""


@dataclass(frozen=True)
class Quickstart:
    """What was made, and where.

    Attributes:
        home: its own registry: ``LORAREG_HOME`` for what one types next.
        answers: prompt → who says what.
        seconds: how long all of it took.
    """

    folder: Path
    home: Path
    recipe: Path
    mixture: Mixture
    answers: dict[str, dict[str, str]]
    seconds: float


def quickstart(
    folder: Path, *, seed: int = 0, force: bool = False, progress: Progress = silent
) -> Quickstart:
    """Run the demonstration in ``folder``.

    Trains a tiny base that repeats English sentences, and six adapters that each change one kind
    of word; then mixes them for a task that needs two of them. Nothing is downloaded.

    Raises:
        OutputError: the folder is there, and is not an earlier quickstart to replace.
    """
    from lorahub_registry.train.codeswitch import SKILLS, UNSEEN
    from lorahub_registry.train.quickstart import make_base, make_rows

    start = time.monotonic()
    folder = folder.absolute()
    _clear(folder, force)
    progress.say("1. A tiny base that repeats what it is told, trained here from nothing.")
    base = make_base(folder / _BASE, seed=seed, progress=progress)
    progress.say(
        f"   {base.parameters:,} parameters in {base.seconds:.0f} s; it repeats "
        f"{base.exact_match:.0%} of unseen sentences."
    )
    task = make_rows(folder / "tasks", seed=seed)
    factory, recipe = folder / "factory.yaml", folder / "recipe.yaml"
    each = (
        ADAPTER.format(name=s.name, skills=", ".join(s.skills), description=s.description)
        for s in SKILLS.values()
    )
    factory.write_text(FACTORY.format(adapters="".join(each), seed=seed), "utf-8")
    names = ", ".join(f"./adapters/{name}" for name in SKILLS)
    recipe.write_text(RECIPE.format(adapters=names, task=task.name, seed=seed), "utf-8")
    home = folder / "home"
    with Registry(home / "registry.sqlite", progress=progress) as registry:
        progress.say("2. Six adapters, each for one kind of word, trained together.")
        progress.say(f"   lorareg train {factory}")
        made = train(factory, registry=registry, progress=progress)
        for name, results in made.results.items():
            before, after = results["test"]
            progress.say(
                f"   {name:<12} {after['exact_match']:4.0%} right at its own skill "
                f"(base {before['exact_match']:.0%})"
            )
        progress.say(f"3. They are in a registry of their own ({home}).")
        found = registry.search(Query(base=_BASE, skills=("translation",), sort="name"))
        progress.say(f"   lorareg search --base {_BASE} --skill translation")
        for stored in found.adapters:
            progress.say(f"   {stored.record.name:<12} {stored.record.description}")
        progress.say(
            f"4. A task that none of them was trained for: {' and '.join(UNSEEN)} at once."
        )
        progress.say(f"   lorareg compose {recipe}")
        mixture = compose(recipe, registry=registry, push=False, progress=progress)
        progress.say(
            "   Exact match is 0% for every single adapter because each changes one kind of word."
        )
        prompts = _prompts(task / "test.jsonl")
        best = mixture.results["verdict"]["against"]
        answers = generate(
            mixture.name,
            prompts,
            against=[BASE, best] if best != BASE else [BASE],
            max_new_tokens=12,
            registry=registry,
            progress=progress,
        )
    seconds = time.monotonic() - start
    said = dict(zip(prompts, answers, strict=True))
    return Quickstart(folder, home, recipe, mixture, said, seconds)


def _clear(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    inside = {p.name for p in folder.iterdir()} if folder.is_dir() else {"a file"}
    if inside and not force:
        raise OutputError(f"{folder} exists", hint="--force replaces an earlier quickstart")
    if foreign := sorted(inside - _PARTS):
        raise OutputError(f"{folder} holds {foreign[0]}, which no quickstart makes: left alone")
    shutil.rmtree(folder)


def _prompts(test: Path) -> list[str]:
    import json

    with test.open(encoding="utf-8") as lines:
        return [json.loads(line)["input"] for line, _ in zip(lines, range(3), strict=False)]
