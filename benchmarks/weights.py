"""Extraction, DARE and merging of models: how fast, how exact, in how much memory.

    python benchmarks/weights.py --part extract    # minutes: the peers take full SVDs
    python benchmarks/weights.py --part stream     # 14 GB of disk; --model-gb for less
    python benchmarks/weights.py --part growth

``extract`` claims: a LoRA of rank 64 from a pair of 4096 x 4096 bfloat16 weights takes at most 1/50
of the CPU time of a full SVD, at one thread, reading included; its error is at most 1.001 times the
least possible at every rank and shape. Peers: the full SVD of Multi-LoRAs' ``extract_lora``
(float32, full matrices; of the wide weight without them, its Vh alone would take 822 MB) and
mergekit's extraction, where mergekit is installed. Both start from tensors in memory and run once
a shape: their time does not depend on the rank.

``stream`` claims: of a sharded model, ``merge`` writes at 60% or more of a plain copy with fsync,
``dare`` at 150 MB/s or more and at twice a plain torch loop, and the peak of each is at most twice
the largest tensor and 500 MB. See ``weights_stream.py``.

``growth`` shows how extraction's time grows with rank, size and threads.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
import weights_stream
from weights_models import CHANGE, DECAY, NOISE, SPECTRUM, delta, write_pairs

from lorahub_registry import __version__
from lorahub_registry.weights.extract import Difference, How, chosen
from lorahub_registry.weights.factorise import Cut
from lorahub_registry.weights.ranks import Ranks
from lorahub_registry.weights.stream.pairs import Models, Pair, open_models
from lorahub_registry.weights.truncate import distance, truncate_dense

FASTER, WORSE = 50.0, 1.001
RANKS = (16, 64, 256)
LAYER = "model.layers.0"
SHAPES = {f"{LAYER}.self_attn.q_proj": (4096, 4096), f"{LAYER}.mlp.down_proj": (4096, 14336)}
GROWTH_RANKS, GROWTH_SIZES, GROWTH_THREADS = (
    (16, 32, 64, 128, 256, 512),
    (1024, 2048, 4096, 8192),
    (1, 2),
)
PACKAGES = ("torch", "safetensors", "mergekit")


def timed(work: Any) -> tuple[Any, common.Cost]:
    """What ``work`` gives, and what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, common.Cost(time.perf_counter() - wall, time.process_time() - cpu)


def costs(cost: common.Cost) -> common.Json:
    """For the JSON."""
    return {"cpu_s": common.rounded(cost.cpu), "wall_s": common.rounded(cost.wall)}


def full_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multi-LoRAs' ``extract_lora``: B = U·S and A = Vh, cut; and all singular values."""
    square = matrix.shape[0] == matrix.shape[1]
    u, s, vh = torch.linalg.svd(matrix, full_matrices=square)
    return u[:, :rank] * s[:rank], vh[:rank], s


def mergekit(base: torch.Tensor, tuned: torch.Tensor, rank: int) -> Any:
    """mergekit's own (A, B) of two bfloat16 weights, and what it took; None without mergekit."""
    try:
        from mergekit.architecture import WeightInfo
        from mergekit.scripts.extract_lora import TaskVectorDecompositionTask, TaskVectorTask
    except ImportError:
        return None

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        # Where the tensors come from is not asked: they are given to the tasks' own ``execute``.
        vector = TaskVectorTask.model_construct().execute(base=base, model=tuned)
        task = TaskVectorDecompositionTask.model_construct(
            weight_info=WeightInfo(name="w"), max_rank=rank
        )
        return task.execute(task_vector=vector)

    return timed(run)


def one_shape(models: Models, pair: Pair, args: argparse.Namespace) -> common.Json:
    """A weight, extracted at every rank, beside the peers."""
    matrix = models.difference(pair, device=args.device)
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    turns = 1 if args.quick else args.turns
    wait = torch.cuda.synchronize if matrix.is_cuda else None

    def ours(rank: int, dtype: torch.dtype = torch.float32) -> Cut:
        return Difference(models, pair, How(Ranks(rank=rank), dtype=dtype, device=args.device)).cut(
            rank, None
        )

    samples = {
        rank: common.alternate({"one": lambda rank=rank: ours(rank)}, turns=turns, wait=wait)["one"]
        for rank in RANKS
    }
    (b, a, values), svd = timed(lambda: full_svd(matrix, max(RANKS)))
    squares = values.double().square()
    least = {rank: math.sqrt(float(squares[rank:].sum())) for rank in RANKS}
    peers: common.Json = {"full SVD": costs(svd)}
    base = models.base.rows(pair.base.info.name).to(args.device)
    tuned = models.tuned.rows(pair.tuned.info.name).to(args.device)
    theirs = mergekit(base, tuned, max(RANKS))
    if theirs is not None:
        peers["mergekit"] = costs(theirs[1])
    # Ours again, after the peers, so that both meet the same machine.
    for rank, sample in samples.items():
        more = common.alternate(
            {"one": lambda rank=rank: ours(rank)}, turns=turns, warmup=0, wait=wait
        )["one"]
        sample.wall += more.wall
        sample.cpu += more.cpu
    found: common.Json = {
        "shape": list(pair.base.shape),
        "norm_over_base": common.rounded(norm / float(base.float().norm())),
        "largest_singular_value_over_norm": common.rounded(float(values[0]) / norm),
        "peers": peers,
        "ranks": {},
    }
    for rank, sample in samples.items():
        cut, rounded = ours(rank), ours(rank, torch.bfloat16)
        cpu, wall = (common.spread(t)["median"] for t in (sample.cpu, sample.wall))
        facts: common.Json = {
            **sample.json(),
            "energy_kept": common.rounded(1 - cut.lost / norm**2),
            "error_over_least": round(math.sqrt(cut.lost) / least[rank], 7),
            "error_over_least_bfloat16_factors": round(math.sqrt(rounded.lost) / least[rank], 7),
            "full_svd_error_over_least": round(
                distance(matrix, b[:, :rank], a[:rank]) / least[rank], 7
            ),
            "times_faster_than_full_svd": {
                "cpu": common.rounded(svd.cpu / cpu),
                "wall": common.rounded(svd.wall / wall),
            },
        }
        if theirs is not None:
            (down, up), cost = theirs
            down, up = down[:rank].float(), up[:, :rank].float()
            product = up @ down
            gap = distance(product, rounded.delta.b.to(product), rounded.delta.a.to(product))
            facts |= {
                "mergekit_error_over_least": round(distance(matrix, up, down) / least[rank], 7),
                "product_from_mergekits_over_its_norm": common.rounded(gap / float(product.norm())),
                "times_faster_than_mergekit": {
                    "cpu": common.rounded(cost.cpu / cpu),
                    "wall": common.rounded(cost.wall / wall),
                },
            }
            del product
        found["ranks"][rank] = facts
        print(
            pair.module,
            rank,
            {k: v for k, v in facts.items() if k not in {"cpu_s", "wall_s"}},
            f"cpu {cpu:.3f} s",
            flush=True,
        )
    print(pair.module, peers, flush=True)
    return found


def extract(args: argparse.Namespace) -> None:
    """Two shapes, three ranks, two peers."""
    shapes = (
        {n: (512, 512 if s[0] == s[1] else 1792) for n, s in SHAPES.items()}
        if args.quick
        else SHAPES
    )
    environment = common.environment(
        PACKAGES, threads=args.threads, seeds={"weights": args.seed, "extract": 0}
    )
    with (
        tempfile.TemporaryDirectory() as place,
        open_models(*write_pairs(Path(place), shapes, args.seed)) as models,
    ):
        pairs = sorted(chosen(models), key=lambda pair: pair.base.info.elements)
        found = {pair.module: one_shape(models, pair, args) for pair in pairs}
    square = next(f for f in found.values() if f["shape"][0] == f["shape"][1])["ranks"][64]
    errors = [r["error_over_least"] for f in found.values() for r in f["ranks"].values()]
    claim = {
        "rank_64_4096_over_full_svd_cpu": common.judged(
            1 / square["times_faster_than_full_svd"]["cpu"], 1 / FASTER
        ),
        "times_faster_cpu": square["times_faster_than_full_svd"]["cpu"],
        "times_faster_wall": square["times_faster_than_full_svd"]["wall"],
        "largest_error_over_least": {
            "measured": max(errors),
            "to_reach": WORSE,
            "reached": max(errors) <= WORSE,
        },
    }
    finish("extract", args, claim, {"weights": found}, environment)


def finish(
    part: str,
    args: argparse.Namespace,
    claim: common.Json,
    found: common.Json,
    environment: common.Json,
) -> None:
    """Print and write."""
    environment["versions"]["lorareg"] = __version__  # also where only mergekit is installed
    for name, judged in claim.items():
        print(name, judged)
    facts: common.Json = {
        "benchmark": f"weights, {part}",
        "claim": claim,
        "work": {
            "dtype": "bfloat16 files" if part == "extract" else "float32 in memory",
            "difference": {
                "norm_over_base": CHANGE,
                "low_rank_part": SPECTRUM,
                "its_nth_value": f"n^-{DECAY}",
                "energy_of_noise": NOISE,
            },
            "device": args.device,
            "reading_included": part == "extract",
        },
        **found,
        "peak_rss_bytes": common.peak_rss(),
        "environment": environment | {"load_after": common.load()},
    }
    common.write(f"weights_{part}", args, facts)


def growth(args: argparse.Namespace) -> None:
    """Rank, size and threads, one at a time; from matrices in memory."""
    environment = common.environment(
        PACKAGES, threads=args.threads, seeds={"weights": args.seed, "extract": 0}
    )
    sizes, ranks = ((256, 1024), (16, 64)) if args.quick else (GROWTH_SIZES, GROWTH_RANKS)

    def cut(matrix: torch.Tensor, rank: int) -> common.Json:
        turns = 3 if matrix.shape[0] < 4096 else 2
        cost = common.alternate({"one": lambda: truncate_dense(matrix, rank=rank)}, turns=turns)[
            "one"
        ]
        facts = {k: v["median"] for k, v in cost.json().items()}
        print(list(matrix.shape), "rank", rank, facts, flush=True)
        return facts

    by_size, by_rank, by_threads = {}, {}, {}
    for size in sizes:
        matrix = delta(size, size, args.seed).to(args.device)
        by_size[size] = cut(matrix, 64)
        if size == sizes[-2]:
            by_rank = {rank: cut(matrix, rank) for rank in ranks}
            for threads in GROWTH_THREADS:
                torch.set_num_threads(threads)
                by_threads[threads] = cut(matrix, 64)
            torch.set_num_threads(args.threads)
    found = {
        "by_size_rank_64": by_size,
        f"by_rank_size_{sizes[-2]}": by_rank,
        "by_threads": by_threads,
    }
    finish("growth", args, {}, found, environment)


def main(args: argparse.Namespace) -> None:
    """The parts asked for."""
    torch.set_num_threads(args.threads)
    parts = {"extract": extract, "growth": growth, "stream": weights_stream.main}
    for name, part in parts.items():
        if args.part in {name, "all"}:
            part(args)


if __name__ == "__main__":
    parser = common.options(__doc__)
    parser.add_argument("--part", choices=["extract", "stream", "growth", "all"], default="all")
    parser.add_argument("--turns", type=int, default=2, help="of the sides that run more than once")
    parser.add_argument("--model-gb", type=float, default=4, help="size of the streamed model")
    given = parser.parse_args()
    if given.part == "all" and given.out:
        parser.error("--out takes one part: each writes a file of its own")
    main(given)
