"""The ``stream`` part of ``weights.py``: a sharded model, rewritten in processes of their own.

A Llama of ``--model-gb`` (bfloat16, 4096 wide, four shards), its tuned twin, an adapter of rank 64
on all linear modules; files in the system's cache. Each job starts from the files, libraries
imported, and ends when its output is on the disk; megabytes are millions of bytes of output. Jobs
run in turns, each in a process of its own with ``--threads`` workers; the disk is quiet when one
begins. The commands are run as a user types them, on all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common
import torch
import weights_jobs
from safetensors import safe_open
from weights_models import write_adapter, write_models

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.stream.checkpoint import Checkpoint

OF_A_COPY, SPEED, OVER_LOOP, MORE = 0.6, 150.0, 2.0, 500_000_000
JOBS_IN_TURNS = ("copy", "merge", "dare", "dare loop")
COMMANDS = ("merge command", "dare command", "extract command")
CHECKED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight")


def job(name: str, place: Path, threads: int) -> common.Json:
    """Run it in a child; what it took, and bytes of its output."""
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if hasattr(os, "sync"):
        os.sync()
    script = [sys.executable, weights_jobs.__file__, name, str(place), str(threads)]
    begin = time.perf_counter()
    done = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True)
    facts: common.Json = json.loads(done.stdout.splitlines()[-1])
    facts["process_wall_s"] = time.perf_counter() - begin
    facts["bytes"] = sum(f.stat().st_size for f in weights_jobs.shards(out))
    print(f"{name:16} {_line(facts)}", flush=True)
    return facts


def _line(facts: common.Json) -> str:
    speed = facts["bytes"] / facts["wall_s"] / 1e6
    return (
        f"wall {facts['wall_s']:7.2f} s  cpu {facts['cpu_s']:7.2f} s  {speed:7.1f} MB/s  "
        f"peak {facts['peak_rss_bytes'] / 1e6:6.0f} MB"
    )


def agrees(name: str, place: Path) -> common.Json:
    """Whether what a job wrote is what its formula says, for two of the tensors."""
    return dict(zip(("q_proj", "down_proj"), (_one(name, place, t) for t in CHECKED), strict=True))


def _one(name: str, place: Path, tensor: str) -> common.Json:
    old, made = _tensor(place / "base", tensor), _tensor(place / "out", tensor)
    if name == "copy":
        return {"equal": bool(torch.equal(old, made))}
    if name == "merge":
        folder = place / "adapter"
        delta = load_deltas(folder, read_facts(folder))[tensor.removesuffix(".weight")]
        right = (old.float() + delta.b @ delta.a).bfloat16()
        return {"share_as_the_formula": float((right == made).float().mean())}
    delta = _tensor(place / "tuned", tensor).float() - old.float()
    right = (old.float() + delta / (1 - weights_jobs.RATE)).bfloat16()
    kept, dropped = made == right, made == old
    return {
        "share_as_the_formula": float((kept | dropped).float().mean()),
        "share_kept": float((kept & ~dropped).sum() / (right != old).sum()),
    }


def _tensor(folder: Path, name: str) -> torch.Tensor:
    for file in weights_jobs.shards(folder):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118  # no dict
                return opened.get_tensor(name)
    raise SystemExit(f"{folder.name} lacks {name}")


def checked(found: common.Json) -> common.Json:
    """``found``, if it is as it should be: rounding may turn one entry in a thousand."""
    for name, tensors in found.items():
        for facts in tensors.values():
            right = facts.get("equal", True) and facts.get("share_as_the_formula", 1) >= 0.999
            if not right or abs(facts.get("share_kept", 0.15) - 0.15) > 0.01:
                raise SystemExit(f"{name} did not write what it should: {facts}")
    return found


def samples(runs: Sequence[common.Json]) -> common.Json:
    """All runs of a job."""
    speeds = [r["bytes"] / r["wall_s"] / 1e6 for r in runs]
    return {
        "cpu_s": common.spread([r["cpu_s"] for r in runs]),
        "wall_s": common.spread([r["wall_s"] for r in runs]),
        "output_bytes": runs[0]["bytes"],
        "mb_per_s": common.spread(speeds),
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in runs),
        "rss_bytes_before": min(r["rss_bytes_before"] for r in runs),
    }


def ratio(over: Sequence[common.Json], under: Sequence[common.Json], key: str) -> common.Json:
    """Of times, turn by turn."""
    return common.spread([a[key] / b[key] for a, b in zip(over, under, strict=True)])


def at_least(measured: float, to_reach: float) -> common.Json:
    """A figure beside its target, where more is better."""
    return {
        "measured": common.rounded(measured),
        "to_reach": to_reach,
        "reached": measured >= to_reach,
    }


def main(args: argparse.Namespace) -> None:
    """Write the models, run the jobs, print and write."""
    environment = common.environment(
        ("torch", "transformers", "safetensors", "numpy"),
        threads=args.threads,
        seeds={"models": args.seed, "dare": weights_jobs.SEED},
    )
    size = 40_000_000 if args.quick else int(args.model_gb * 1e9)
    with tempfile.TemporaryDirectory(prefix="lorareg-stream-") as folder:
        place = Path(folder)
        room = shutil.disk_usage(place).free
        if room < 3.5 * size:
            raise SystemExit(
                f"{room / 1e9:.1f} GB are free for temporary files, {3.5 * size / 1e9:.1f} are "
                "needed: take a smaller --model-gb, or set TMPDIR"
            )
        base, _ = write_models(place, size, args.seed, quick=args.quick)
        write_adapter(base, place / "adapter", weights_jobs.RANK, args.seed)
        facts = _measured(place, args)
    facts |= {"environment": environment | {"load_after": common.load()}}
    for name, judged in facts["claim"].items():
        print(name, judged)
    common.write("weights_stream", args, facts)


def _measured(place: Path, args: argparse.Namespace) -> common.Json:
    turns = 1 if args.quick else args.turns
    with Checkpoint(place / "base") as base:
        largest, total, files = base.largest, base.bytes, len(base.files)
    libraries = job("imports", place, args.threads)["peak_rss_bytes"]
    runs: dict[str, list[common.Json]] = {name: [] for name in JOBS_IN_TURNS}
    agreement: common.Json = {}
    for turn in range(turns):
        first = turn % len(JOBS_IN_TURNS)
        for name in JOBS_IN_TURNS[first:] + JOBS_IN_TURNS[:first]:
            runs[name].append(job(name, place, args.threads))
            if turn == 0:
                agreement[name] = agrees(name, place)
    checked(agreement)
    runs["extract"] = [job("extract", place, args.threads)]
    digest = job("digests", place, args.threads)
    runs |= {name: [job(name, place, args.threads)] for name in COMMANDS}
    copy_over = ratio(runs["copy"], runs["merge"], "wall_s")
    loop_over = {key: ratio(runs["dare loop"], runs["dare"], f"{key}_s") for key in ("wall", "cpu")}
    speed = samples(runs["dare"])["mb_per_s"]["median"]
    limit = 2 * largest + MORE
    rewriting = ("merge", "dare", "extract", *COMMANDS)
    peaks = {name: samples(runs[name])["peak_rss_bytes"] for name in rewriting}
    return {
        "benchmark": "weights, stream",
        "claim": {
            "merge_over_copy_with_fsync": at_least(copy_over["median"], OF_A_COPY),
            "dare_mb_per_s": at_least(speed, SPEED),
            "dare_over_plain_loop_wall": at_least(loop_over["wall"]["median"], OVER_LOOP),
            "dare_over_plain_loop_cpu": at_least(loop_over["cpu"]["median"], OVER_LOOP),
            "largest_peak_rss_bytes": common.judged(max(peaks.values()), limit),
        },
        "work": {
            "model_bytes": total, "largest_tensor_bytes": largest, "shards": files,
            "dtype": "bfloat16", "adapter_rank": weights_jobs.RANK, "rate": weights_jobs.RATE,
            "extracted": f"rank {weights_jobs.RANK} of {weights_jobs.LAYER}",
        },
        "agreement": agreement,
        "ratios": {"copy_over_merge_wall": copy_over, "loop_over_dare": loop_over},
        "jobs": {name: samples(found) for name, found in runs.items()},
        "digest_of_one_model": {key: common.rounded(digest[key]) for key in ("wall_s", "cpu_s")},
        "peak_rss_bytes": {**peaks, "limit": limit, "imports alone": libraries},
    }  # fmt: skip
