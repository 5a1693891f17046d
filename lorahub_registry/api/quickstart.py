"""The whole idea in two minutes: train, register, search, mix, prove, talk."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lorahub_registry.api.index import add
from lorahub_registry.api.mix import Mixture, compose
from lorahub_registry.api.talk import BASE, generate
from lorahub_registry.errors import OutputError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.records import Query
from lorahub_registry.registry.store import Registry

_PARTS = frozenset({"home", "quickstart-base", "adapters", "tasks", "mixture", "recipe.yaml"})
NAME = "spanish-animals-french-verbs"
TASK = "tasks/es-animals-fr-does"
RECIPE = f"""\
# lorareg compose {{path}}
version: 1
name: {NAME}
base: ./quickstart-base
adapters: [{{adapters}}]
method: {{{{type: learn, budget: 40}}}}
data:
  train: {{{{path: {TASK}/train.jsonl, input: input, output: output}}}}
  test: {{{{path: {TASK}/test.jsonl, input: input, output: output}}}}
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
    from lorahub_registry.train import quickstart as trained
    from lorahub_registry.train.codeswitch import UNSEEN

    start = time.monotonic()
    folder = folder.absolute()
    _clear(folder, force)
    progress.say("1. A tiny base that repeats what it is told, trained here from nothing.")
    base = trained.make_base(folder / trained.BASE_NAME, seed=seed, progress=progress)
    progress.say(
        f"   {base.parameters:,} parameters in {base.training.seconds:.0f} s; it repeats "
        f"{base.score.exact_match:.0%} of unseen sentences."
    )
    progress.say("2. Six adapters, each for one kind of word.")
    made = trained.make_adapters(
        folder / trained.BASE_NAME, folder / "adapters", seed=seed, progress=progress
    )
    for adapter in made:
        progress.say(
            f"   {adapter.name:<12} {adapter.score.exact_match:4.0%} right at its own skill "
            f"(base {adapter.base_score.exact_match:.0%})"
        )
    trained.make_task(folder / TASK, seed=seed)
    recipe = folder / "recipe.yaml"
    names = ", ".join(f"./adapters/{adapter.name}" for adapter in made)
    recipe.write_text(RECIPE.format(path=recipe.name, adapters=names, seed=seed), "utf-8")
    home = folder / "home"
    with Registry(home / "registry.sqlite", progress=progress) as registry:
        progress.say(f"3. They go into a registry of their own ({home}).")
        add([folder / "adapters"], registry=registry, progress=progress)
        found = registry.search(Query(base=base.name, skills=("translation",), sort="name"))
        progress.say(f"   lorareg search --base {base.name} --skill translation")
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
        prompts = _prompts(folder / TASK / "test.jsonl")
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
