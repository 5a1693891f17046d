"""Peak memory of ``train.py``'s sides, each in a process of its own.

    python benchmarks/train_memory.py '{"side": "together", "shape": "60M", ...}'

Counted from what the process holds with the base alone, after one forward, to the highest there
was since: adapters, gradients, moments, activations. On a CPU that is VmHWM less VmRSS, the
highest being set back in between; on a GPU what its allocator says.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import common
import torch
from peft import get_peft_model
from train_sides import (
    SHAPES,
    config_of,
    copied,
    inputs_of,
    loop,
    make_base,
    make_learners,
    taken,
    tensors_of,
)

from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.train.run import train

STEPS = 2
_STATUS = Path("/proc/self/status")


def peak(facts: common.Json) -> common.Json | None:
    """Run one side in a child; None where the system does not tell a process's highest size."""
    if facts["device"] == "cpu" and not _STATUS.is_file():
        return None
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(facts)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: common.Json = json.loads(done.stdout.splitlines()[-1])
    print(
        f"memory {facts['side']:9} {facts['shape']} {facts['adapters']} x {facts['tokens']}"
        f"{' checkpointed' if facts['checkpointing'] else ''}: "
        f"{found['over_base_bytes'] / 1e6:.0f} MB over the base's {found['base_bytes'] / 1e6:.0f}",
        flush=True,
    )
    return facts | found


def size(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    return int(_STATUS.read_text().split(f"{name}:")[1].split()[0]) * 1024


def together(base: LoadedBase, facts: common.Json) -> None:
    """As ``lorareg train`` does it."""
    learners = make_learners(base, facts["adapters"], facts["tokens"], STEPS)
    train(base, learners, gradient_checkpointing=facts["checkpointing"])


def peft(base: LoadedBase, facts: common.Json) -> None:
    """One adapter after the other on one base, each taken off again."""
    plain = base.model
    for n in range(facts["adapters"]):
        [learner] = make_learners(base, facts["adapters"], facts["tokens"], STEPS, only=n)
        rows = [inputs_of(row, base.device) for row in taken(learner)]
        model = get_peft_model(plain, config_of(learner.plan.lora)).train()
        values = tensors_of(model, "default", learner)
        copied(learner, values)
        del learner
        optimizer = torch.optim.AdamW(values, lr=1e-3, weight_decay=0.0, fused=True)
        loop(model, values, optimizer, rows)
        plain = model.unload()
        if hasattr(plain, "peft_config"):
            del plain.peft_config
        del model, values, optimizer
        gc.collect()


def main(facts: common.Json) -> None:
    """Measure and print."""
    torch.set_num_threads(facts["threads"])
    base = make_base(SHAPES[facts["shape"]], facts["seed"], facts["device"])
    with torch.no_grad():
        base.model(input_ids=torch.ones(1, 8, dtype=torch.long, device=base.device))
    gc.collect()
    side = {"together": together, "peft": peft}[facts["side"]]
    if facts["device"] == "cuda":
        over = common.peak_on_gpu(lambda: side(base, facts))
        before = None
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = size("VmRSS")
        if size("VmHWM") > before + 2**20:
            raise SystemExit("the highest size of this process cannot be set back here")
        side(base, facts)
        over = size("VmHWM") - before
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    print(
        json.dumps({"over_base_bytes": over, "base_bytes": weights, "process_before_bytes": before})
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
