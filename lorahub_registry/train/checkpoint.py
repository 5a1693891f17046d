"""A run between two rounds, in one file: the old checkpoint or the new one, nothing between."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lorahub_registry.errors import OutputError
from lorahub_registry.train.learner import Learner, Progressed
from lorahub_registry.train.run import Run

NAME = "checkpoint.safetensors"
_FACTS = "/facts"  # no adapter is called so


def save(folder: Path, run: Run, learners: Sequence[Learner]) -> None:
    """Keep parameters, optimizers and how far each learner is.

    Raises:
        OutputError: the disk is full, or cannot be written; an earlier checkpoint stays.
    """
    tensors = {
        f"{learner.plan.name}/{name}": tensor.detach().cpu()
        for learner in learners
        for name, tensor in learner.tensors().items()
    }
    facts = {"run": asdict(run), "learners": {a.plan.name: asdict(a.at) for a in learners}}
    # A tensor, for the file's header has a limit that the losses of long runs pass.
    tensors[_FACTS] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    part = folder / f"{NAME}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, folder / NAME)
        _settle(folder)
    except (OSError, SafetensorError) as error:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass  # it is in nobody's way
        raise OutputError(
            f"{folder / NAME}: the checkpoint cannot be written ({error})",
            hint="make room, and give the same command again: it goes on from the one before",
        ) from None


def _settle(folder: Path) -> None:
    """What was renamed in ``folder`` stays so, whatever happens to the machine."""
    if os.name != "posix":
        return  # folders cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def restore(folder: Path, learners: Sequence[Learner]) -> Run | None:
    """Put the learners where the checkpoint in ``folder`` has them; None where there is none.

    Raises:
        OutputError: it is damaged, or one of other learners.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    kept: dict[str, dict[str, Any]] = {learner.plan.name: {} for learner in learners}
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.get_tensor(_FACTS).numpy().tobytes())
            for key in file.keys():  # noqa: SIM118
                if key != _FACTS:
                    name, _, part = key.partition("/")
                    kept[name][part] = file.get_tensor(key)
        for learner in learners:
            name = learner.plan.name
            learner.restore(_progressed(facts["learners"][name]), kept[name])
        run = facts["run"]
        return Run(run["rounds"], run["together"], [tuple(r) for r in run["reduced"]])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise OutputError(
            f"{path}: not a checkpoint of this run ({error})",
            hint="delete the folder that it is in, or give --force, to begin anew",
        ) from None


def _progressed(facts: dict[str, Any]) -> Progressed:
    return Progressed(
        **facts
        | {
            "loss": [(step, loss) for step, loss in facts["loss"]],
            "validation": [(step, nll) for step, nll in facts["validation"]],
        }
    )
