"""What the benchmarks share: options, alternating runs, medians and spread, facts, JSON.

A benchmark runs both sides on the same inputs in turns, so that what else the machine does falls
on both, and says how they compare. Ratios count: each is taken within one turn, and the median of
the turns' ratios is the figure. Nothing in the JSON names the machine or a path on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Json = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """What one run took, in seconds."""

    wall: float
    cpu: float


@dataclass
class Samples:
    """What all runs of one side took."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, cost: Cost) -> None:
        """One run more."""
        self.wall.append(cost.wall)
        self.cpu.append(cost.cpu)

    def json(self) -> Json:
        """Both times with their spread."""
        return {"cpu_s": spread(self.cpu), "wall_s": spread(self.wall)}


def options(document: str | None, *, device: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark takes.

    Args:
        document: the script's docstring, shown as its help.
        device: it can run on a GPU.
    """
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    places = ["cpu", "cuda"] if device else ["cpu"]
    parser.add_argument("--device", choices=places, default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch's products")
    parser.add_argument("--quick", action="store_true", help="a few turns: does it run at all?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="the JSON file (default: results/, nothing with --quick)"
    )
    return parser


def alternate(
    sides: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    warmup: int = 1,
    wait: Callable[[], object] | None = None,
) -> dict[str, Samples]:
    """Run each side once a turn, the order moving on by one with every turn.

    A side that gives a :class:`Cost` has measured itself (a child process); the others are
    measured here.

    Args:
        wait: called before a clock is read (a GPU works on by itself).
    """
    samples = {name: Samples() for name in sides}
    names = list(sides)
    for turn in range(-warmup, turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            cost = _measured(sides[name], wait)
            if turn >= 0:
                samples[name].add(cost)
    return samples


def _measured(side: Callable[[], object], wait: Callable[[], object] | None) -> Cost:
    if wait:
        wait()
    wall, cpu = time.perf_counter(), time.process_time()
    result = side()
    if wait:
        wait()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return result if isinstance(result, Cost) else Cost(wall, cpu)


def spread(values: Sequence[float]) -> Json:
    """Number, median, least, quartiles and largest."""
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    else:
        low = high = values[0]
    numbers = {
        "median": statistics.median(values),
        "min": min(values),
        "q1": low,
        "q3": high,
        "max": max(values),
    }
    return {"n": len(values), **{name: rounded(value) for name, value in numbers.items()}}


def ratios(ours: Samples, peer: Samples) -> Json:
    """Ours as a multiple of the peer's, turn by turn."""
    return {
        "cpu": spread([a / b for a, b in zip(ours.cpu, peer.cpu, strict=True)]),
        "wall": spread([a / b for a, b in zip(ours.wall, peer.wall, strict=True)]),
    }


def rounded(value: float) -> float:
    """Four digits: more would pretend."""
    return float(f"{value:.4g}")


def judged(measured: float, to_reach: float, stretch: float | None = None) -> Json:
    """A figure beside its target, where less is better."""
    facts: Json = {
        "measured": rounded(measured),
        "to_reach": to_reach,
        "reached": measured <= to_reach,
    }
    if stretch is not None:
        facts |= {"stretch": stretch, "stretch_reached": measured <= stretch}
    return facts


def environment(packages: Sequence[str], *, threads: int, seeds: Mapping[str, int]) -> Json:
    """The facts that a number cannot be read without."""
    facts: Json = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "seeds": dict(seeds),
        "load": load(),
        "python_speed_s": rounded(python_speed()),
        "versions": {name: installed(name) for name in ("lorareg", *packages)},
    }
    if "torch" in sys.modules:
        facts["gemm"] = gemm()
    return facts


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The CPU's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes."""
    return [rounded(x) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def python_speed() -> float:
    """CPU seconds of a fixed loop, the best of five: how fast this machine is just now."""

    def once() -> float:
        begin, total = time.process_time(), 0
        for i in range(1_000_000):
            total += i
        return time.process_time() - begin

    return min(once() for _ in range(5))


def gemm() -> Json:
    """What multiplies float32 matrices in this process."""
    import torch

    mkldnn: Any = torch.backends.mkldnn  # half typed
    blas = [w for w in torch.__config__.show().replace(",", " ").split() if "BLAS_INFO=" in w]
    facts: Json = {
        "blas": blas[0].partition("=")[2] if blas else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": bool(mkldnn.is_available() and mkldnn.enabled),
        "mkldnn_fp32_precision": getattr(mkldnn.matmul, "fp32_precision", None),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["cuda_tf32"] = torch.backends.cuda.matmul.allow_tf32
    return facts


def peak_on_gpu(side: Callable[[], object]) -> int:
    """Bytes on the GPU that one run of ``side`` needs on top of what lies there before it.

    A CPU has no such figure: what was freed stays in the process, and the next run takes it.
    """
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_rss() -> int:
    """The largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def write(name: str, args: argparse.Namespace, facts: Json) -> None:
    """Write the JSON; what differs from the default run stands in the file's name."""
    if args.device != "cpu":
        name += f"-{args.device}"
    if args.threads != 1:
        name += f"-{args.threads}threads"
    out: Path | None = args.out
    if out is None:
        if args.quick:
            return
        out = RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {out.name}")
