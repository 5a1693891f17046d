"""Train: from a factory to a shelf of written, scored and registered adapters."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.api.bases import load_found
from lorahub_registry.api.estimate import estimate, in_words
from lorahub_registry.api.factory import Ready, prepare_factory
from lorahub_registry.api.output import report_head, resumable, write_report
from lorahub_registry.api.papers import enter, write_papers
from lorahub_registry.api.trained import ended, place_of, results_of, risen, scored
from lorahub_registry.api.unfinished import agree, board_writer, logs, sign
from lorahub_registry.api.written import add_digests
from lorahub_registry.card import LOG_NAME
from lorahub_registry.errors import DataError, NotApplied, OutputError
from lorahub_registry.lock import Lock, Pin
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.factory_file import (
    FactoryFile,
    factory_digest,
    factory_of_one,
    factory_yaml,
)
from lorahub_registry.refs import looks_like_path
from lorahub_registry.registry.records import StoredAdapter
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.evaluate.base import LoadedBase
    from lorahub_registry.train.crew import Crew
    from lorahub_registry.train.learner import Learner
    from lorahub_registry.train.run import Run

_CHECKPOINT = ".checkpoint"
_RECORD = (
    "# How this adapter was trained; local files and a local base have only their names here.\n"
)


@dataclass(frozen=True)
class Trained:
    """What :func:`train` made.

    Attributes:
        path: the folder that the adapters' folders are in.
        adapters: those that came to their end, as the registry has them, by name.
        results: what each one's ``results.json`` holds, by name.
        failed: name → why it has no adapter: it diverged, or memory did not hold it.
        report: what ``lorareg.json`` in the folder holds.

    Of several processes only the leading one has anything but the path.
    """

    path: Path
    adapters: Mapping[str, StoredAdapter]
    results: Mapping[str, dict[str, Any]]
    failed: Mapping[str, str]
    report: Mapping[str, Any]


def train(
    factory: str | Path | Mapping[str, Any] | FactoryFile,
    *,
    registry: Registry | None = None,
    max_together: int | None = None,
    force: bool = False,
    tensorboard: Path | None = None,
    progress: Progress = silent,
) -> Trained:
    """Train every adapter of a factory on one loaded base.

    Each becomes what it would become alone. A run that is stopped keeps its last checkpoint beside
    the output; the same call goes on from there, to the same result.

    Args:
        factory: a file, plain data, or one read already.
        registry: where the adapters are entered; None: the default one.
        max_together: most adapters in one pass, in place of the factory's.
        force: replace what an earlier run wrote, and forget what one of another factory left
            unfinished.
        tensorboard: a folder to write its event files to, too.

    Raises:
        DataError: no adapter came to its end.
        LoraregError: what went wrong; nothing stands in the output's place then.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return train(
                factory, registry=opened, max_together=max_together, force=force,
                tensorboard=tensorboard, progress=progress,
            )  # fmt: skip
    from lorahub_registry.train.crew import Crew

    if tensorboard is not None:
        board_writer()  # before it costs time
    crew = Crew()
    progress = progress if crew.leads else silent
    ready = prepare_factory(factory, registry=registry, force=force, progress=progress)
    if crew.leads:
        progress.say(in_words(estimate(ready, max_together=max_together)))
    base = _loaded(ready, crew.device, progress)
    if any(order.plan.training.packing for order in ready.orders):
        from lorahub_registry.evaluate.packing import check_packing

        check_packing(base)
    learners = _learners(ready, base)
    key = _key(ready)
    if not crew.leads:
        return _follow(ready, base, learners, crew, max_together)
    agree(ready.out, key, force=force)
    results: dict[str, dict[str, Any]] = {}
    with resumable(
        ready.out, key, force=force, progress=progress, unit="checkpoints", keep=True
    ) as part:
        from lorahub_registry.evaluate.quiet import tf32, threads_for

        sign(part.folder, key)
        run, learners = _restored(part, ready, base, learners, force=force, progress=progress)
        crew.wait()
        with threads_for(base.model), tf32(ready.factory.tf32):
            run = _run(ready, base, learners, run, crew, part, max_together, tensorboard, progress)
            made = [learner for learner in learners if learner.at.state in {"done", "early"}]
            if not made:
                raise _none(part, learners)
            before: dict[str, Any] = {}
            with progress.task("Writing and scoring", len(made), "adapter") as task:
                for learner in made:
                    name = learner.plan.name
                    for note in risen(learner.at.loss):
                        progress.warn(f"{name}: {note}")
                    task.describe(name)
                    try:
                        results[name] = _write(
                            part.folder / name, ready, base, learner, run, before, progress
                        )
                    except NotApplied as error:
                        for path in (part.folder / name).iterdir():
                            if path.name != LOG_NAME:
                                path.unlink()
                        learner.fail(f"{error} ({error.hint})" if error.hint else str(error))
                        progress.warn(f"{name}: {learner.at.why}")
                    task.advance()
            if not results:
                raise _none(part, learners)
            places = {
                order.plan.name: place_of(ready, order, base, progress)
                for order in ready.orders
                if order.plan.name in results
            }
        failed = {a.plan.name: a.at.why for a in learners if a.plan.name not in results}
        report = _report(ready, run, results, failed)
        write_report(part.folder, report)
    adapters = {
        name: enter(
            ready.out / name,
            found,
            (ready.out / name / "factory.yaml").read_text("utf-8"),
            factory_digest(_one(ready, name)),
            registry,
            base_folder=ready.base.folder if ready.base.local else None,
        )
        for name, found in results.items()
    }
    for name, stored in adapters.items():
        adapters[name] = registry.put_centroid(stored.ref, places[name])
    return Trained(ready.out, adapters, results, failed, report)


def _restored(
    part: Any,
    ready: Ready,
    base: LoadedBase,
    learners: list[Learner],
    *,
    force: bool,
    progress: Progress,
) -> tuple[Run, list[Learner]]:
    """Where an earlier run was stopped; with ``force`` the beginning, where that cannot be read."""
    from lorahub_registry.train import checkpoint
    from lorahub_registry.train.run import Run

    folder = part.folder / _CHECKPOINT
    try:
        run = checkpoint.restore(folder, learners)
    except OutputError as error:
        if not force:
            raise
        progress.warn(f"{error}: it is begun anew")
        shutil.rmtree(folder)
        return Run(), _learners(ready, base)
    if run is not None:
        progress.say(f"going on after round {run.rounds}")
    return run or Run(), learners


def _none(part: Any, learners: list[Learner]) -> DataError:
    part.done.clear()  # the same command would come to the same end
    each = "; ".join(f"{learner.plan.name}: {learner.at.why}" for learner in learners)
    return DataError(f"no adapter came to its end: {each}")


def _loaded(ready: Ready, device: str | None, progress: Progress) -> LoadedBase:
    factory = ready.factory
    place = device if device and factory.device in {"auto", "cuda"} else factory.device
    return load_found(ready.base, place, factory.dtype, progress, quantization=factory.quantization)


def _learners(ready: Ready, base: LoadedBase) -> list[Learner]:
    import torch

    from lorahub_registry.train.learner import Learner, items_of
    from lorahub_registry.train.scoring import holding

    learners = []
    for number, order in enumerate(ready.orders):
        plan = order.plan
        held_out = order.splits.get("validation")
        assert plan.training.seed is not None  # the factory's, where it has none of its own
        with holding(f"the base and {number + 1} of {len(ready.orders)} adapters"):
            learner = Learner(
                number,
                plan,
                base.model,
                items_of(order.splits["train"].tokens.rows, plan),
                held_out.tokens.rows if held_out else [],
                seed=plan.training.seed,
                vocabulary=ready.vocabulary,
                half=base.model.dtype == torch.float16,
            )
        learners.append(learner)
    return learners


def _key(ready: Ready) -> dict[str, Any]:
    """All that decides what is trained, by what a person would call it."""
    factory = ready.factory
    adapters = {
        order.plan.name: order.plan.model_dump(
            mode="json", exclude={"description", "skills", "license"}
        )
        | {"files": {name: split.sha256 for name, split in order.splits.items()}}
        for order in ready.orders
    }
    computed = {
        "dtype": factory.dtype, "quantization": factory.quantization, "tf32": factory.tf32
    }  # fmt: skip
    return {"base": ready.base.key | computed, "adapters": adapters}


def _run(
    ready: Ready,
    base: LoadedBase,
    learners: list[Learner],
    run: Run,
    crew: Crew,
    part: Any,
    max_together: int | None,
    tensorboard: Path | None,
    progress: Progress,
) -> Run:
    from lorahub_registry.train import checkpoint
    from lorahub_registry.train.run import Hooks
    from lorahub_registry.train.run import train as run_all

    factory, folder = ready.factory, part.folder / _CHECKPOINT
    with logs(part.folder, learners, tensorboard) as log:

        def save(run: Run) -> None:
            log.flush()
            checkpoint.save(folder, run, learners)
            part.mark(_CHECKPOINT, run.rounds)
            part.flush()

        def finished(learner: Learner) -> None:
            if learner.at.state in {"diverged", "failed"}:
                progress.warn(f"{learner.plan.name}: stopped: {learner.at.why}; the others go on")
            else:
                progress.say(ended(learner))

        run = run_all(
            base,
            learners,
            max_together=max_together or factory.max_together,
            gradient_checkpointing=factory.gradient_checkpointing,
            run=run,
            hooks=Hooks(log.entry, finished, save, factory.save_steps),
            crew=crew,
            progress=progress,
        )
        save(run)
    return run


def _follow(
    ready: Ready, base: LoadedBase, learners: list[Learner], crew: Crew, max_together: int | None
) -> Trained:
    """The part of a process that does not lead: it computes, and writes nothing."""
    from lorahub_registry.evaluate.quiet import tf32, threads_for
    from lorahub_registry.train import checkpoint
    from lorahub_registry.train.run import train as run_all
    from lorahub_registry.weights.stream.part import unfinished

    crew.wait()  # until the leader has seen to what an earlier run left
    run = checkpoint.restore(unfinished(ready.out) / _CHECKPOINT, learners)
    with threads_for(base.model), tf32(ready.factory.tf32):
        run_all(
            base,
            learners,
            max_together=max_together or ready.factory.max_together,
            gradient_checkpointing=ready.factory.gradient_checkpointing,
            run=run,
            crew=crew,
        )
    return Trained(ready.out, {}, {}, {}, {})


def _write(
    folder: Path,
    ready: Ready,
    base: LoadedBase,
    learner: Learner,
    run: Run,
    before: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """An adapter's folder, whole; what is scored is what stock PEFT loads from it."""
    from lorahub_registry.train.parameters import Parameters
    from lorahub_registry.train.write import write_adapter

    assert isinstance(learner.parameters, Parameters)
    order = ready.orders[learner.number]
    folder.mkdir(exist_ok=True)
    write_adapter(
        folder,
        learner.parameters,
        base.model,
        base=base.name,
        base_revision=base.revision,
        task_type=base.task_type,
        dtype=ready.factory.output.dtype,
    )
    found = results_of(ready, order, base, learner, run)
    found |= scored(folder, ready, order, base, before, progress)
    add_digests(found, folder)
    one = _one(ready, learner.plan.name)
    text = _RECORD + factory_yaml(one)
    lock = Lock(
        recipe=factory_digest(one),
        base=Pin(base.name, base.revision, digest=ready.base.facts.digest),
        adapters={},
        data={name: split.pin for name, split in order.splits.items()},
    )
    return write_papers(folder, found, text, lock)


def _one(ready: Ready, name: str) -> Any:
    """The factory of one adapter alone, resolved, without a path of this machine."""
    facts = ready.base.facts
    named = f"{facts.name}@{facts.revision}" if facts.revision else facts.name
    if ready.base.local and looks_like_path(ready.factory.base):
        named = f"./{facts.name}"
    return factory_of_one(ready.factory, name, base=named)


def _report(
    ready: Ready, run: Run, results: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]
) -> dict[str, Any]:
    """``lorareg.json`` of the shelf: what was made together, and what was not."""
    return {
        **report_head("train", "transformers", "peft"),
        "name": ready.factory.name,
        "base": ready.base.facts.named,
        "rounds": run.rounds,
        "together": run.together,
        "reduced": run.reduced,
        "adapters": sorted(results),
        "failed": dict(failed),
    }
