"""What ``weights_stream.py`` measures, each in a process of its own, with its own peak of memory.

    python benchmarks/weights_jobs.py JOB PLACE THREADS

PLACE holds ``base``, ``tuned`` and ``adapter``; the output goes to PLACE/out. Prints one line of
JSON. A job that ends in ``command`` is the command as a user types it, from ``lorareg`` on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from lorahub_registry.adapters.base_files import base_digest
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.cli import cli
from lorahub_registry.weights.dare import Drop
from lorahub_registry.weights.drop import drop_model
from lorahub_registry.weights.extract import Difference, How, chosen
from lorahub_registry.weights.factorise import assemble, factorise
from lorahub_registry.weights.merge import plan
from lorahub_registry.weights.merged import AdapterFile
from lorahub_registry.weights.ranks import Ranks
from lorahub_registry.weights.stream.checkpoint import Checkpoint
from lorahub_registry.weights.stream.pairs import open_models
from lorahub_registry.weights.stream.part import Part
from lorahub_registry.weights.stream.rewrite import rewrite
from lorahub_registry.weights.stream.skeleton import read_skeleton

RATE, SEED, RANK = 0.85, 0, 64
LAYER = "*.layers.0.*"
"""What is extracted: the seven matrices of one layer."""
Job = Callable[[Path, int], None]


def shards(folder: Path) -> list[Path]:
    """A model's files."""
    return sorted(folder.glob("*.safetensors"))


def imports(place: Path, threads: int) -> None:
    """What Python and the libraries take; transformers loads an architecture when it is used."""
    read_skeleton(place / "base")


def copy(place: Path, threads: int) -> None:
    """The base's shards, on the disk when it is done."""
    for file in shards(place / "base"):
        target = place / "out" / file.name
        shutil.copyfile(file, target)
        sync(target)


def sync(file: Path) -> None:
    """Return when the file is on the disk."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def dare_loop(place: Path, threads: int) -> None:
    """DARE as a plain loop over shards and tensors, on the disk when it is done."""
    random = torch.Generator().manual_seed(SEED)
    for file in shards(place / "tuned"):
        made = {}
        with safe_open(place / "base" / file.name, "pt") as base, safe_open(file, "pt") as tuned:
            for name in tuned.keys():  # noqa: SIM118  # no dict
                old, new = base.get_tensor(name).float(), tuned.get_tensor(name)
                delta = new.float() - old
                mask = torch.bernoulli(torch.full_like(delta, 1 - RATE), generator=random)
                made[name] = (old + delta * mask / (1 - RATE)).to(new.dtype)
        save_file(made, place / "out" / file.name, metadata={"format": "pt"})
        sync(place / "out" / file.name)


def dare(place: Path, threads: int) -> None:
    """Ours, from the files to the files, without the command around it."""
    with open_models(place / "base", place / "tuned") as models, Part(place / "out", {}) as part:
        drop_model(models, Drop(RATE, seed=SEED), part, workers=threads)
        finished(part, place)


def merge(place: Path, threads: int) -> None:
    """Ours, from the files to the files, without the command around it."""
    folder = place / "adapter"
    files = [AdapterFile("adapter", folder, read_facts(folder), 1.0)]
    with Checkpoint(place / "base") as source, Part(place / "out", {}) as part:
        planned = plan(source, files, base="base")
        rewrite(
            part,
            planned.layout,
            source,
            planned.rewrites(source, files),
            lambda name, begin, end: source.forget(planned.origin(name), begin, end),
            title="",
            workers=threads,
        )
        finished(part, place)


def extract(place: Path, threads: int) -> None:
    """Ours, from the files to the files, without the command around it."""
    ranks = Ranks(rank=RANK)
    with open_models(place / "base", place / "tuned") as models, Part(place / "out", {}) as part:
        how = How(ranks, dtype=torch.bfloat16)
        sources = [Difference(models, pair, how) for pair in chosen(models, [LAYER])]
        assemble(part, sources, factorise(sources, ranks, how.dtype, part, title=""), how.dtype)
        finished(part, place)


def digests(place: Path, threads: int) -> None:
    """A model's identity, which no command here computes: SHA-256 of its tensors."""
    base_digest(place / "base")


def finished(part: Part, place: Path) -> None:
    """Move what was made to its place; it is on the disk already."""
    for file in shards(part.folder):
        os.replace(file, place / "out" / file.name)
    part.forget()


def command(*words: str, adapter: bool = False) -> Job:
    """``lorareg`` with these words."""

    def run(place: Path, threads: int) -> None:
        os.environ["LORAREG_HOME"] = str(place / "home")
        (place / "out").rmdir()
        second = ["--adapter", "adapter"] if adapter else ["--tuned", "tuned"]
        given = ["--base", "base", *second]
        given = [str(place / w) if w in {"base", "tuned", "adapter"} else w for w in given]
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            cli.main(
                [*words, *given, "--out", str(place / "out"), "--format", "quiet"],
                prog_name="lorareg",
                standalone_mode=False,
            )

    return run


JOBS: dict[str, Job] = {
    "imports": imports,
    "copy": copy,
    "dare loop": dare_loop,
    "dare": dare,
    "merge": merge,
    "extract": extract,
    "digests": digests,
    "dare command": command("dare", "--rate", str(RATE)),
    "merge command": command("merge", adapter=True),
    "extract command": command(
        "extract", "--rank", str(RANK), "--include", LAYER, "--rest", "ignore"
    ),
}


def peak() -> int:
    """The largest resident size of this process, in bytes.

    Not ``ru_maxrss``, where the system tells it: what the parent held at the fork counts there.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return common.peak_rss()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(job: str, place: Path, threads: int) -> None:
    """Run it, print what it took."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    imports(place, threads)
    before, wall, cpu = peak(), time.perf_counter(), time.process_time()
    JOBS[job](place, threads)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    facts = {"wall_s": wall, "cpu_s": cpu, "peak_rss_bytes": peak(), "rss_bytes_before": before}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
