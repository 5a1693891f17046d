"""Two processes that share every batch, over gloo, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import Tiny

FACTORY = """\
version: 1
name: two
base: {base}
seed: 3
defaults: {{training: {{learning_rate: 1.0e-2, max_steps: 4}}}}
adapters:
  - name: even
    lora: {{r: 4}}
    training: {{batch_size: 5}}
    data: {{train: {{path: rows.jsonl}}, validation: 0.2}}
  - name: odd
    lora: {{r: 2, use_dora: true}}
    training: {{batch_size: 1, gradient_accumulation_steps: 3}}
    data: {{train: {{path: rows.jsonl}}}}
output: {{path: {out}}}
"""


def run(folder: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LORAREG_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            sys.executable,
            *launcher,
            "-m",
            "lorahub_registry",
            "train",
            str(folder / "factory.yaml"),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")
def test_two_processes_make_the_adapters_that_one_makes(tmp_path, tiny_llama: Tiny):
    made = []
    for name, launcher in (
        ("one", ()),
        ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")),
    ):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"input": f"say {'ab' * n}", "output": "ba" * n} for n in range(1, 13)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = FACTORY.format(base=tiny_llama.folder, out="out")
        (folder / "factory.yaml").write_text(text)
        done = run(folder, *launcher)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("2 adapters written") == 1  # one of them talks
        made.append(folder / "out")
    for name in ("even", "odd"):
        one, two = (load_file(out / name / "adapter_model.safetensors") for out in made)
        moved = max(float(t.abs().max()) for key, t in one.items() if "lora_B" in key)
        assert moved > 1e-3
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, two[key], rtol=0, atol=1e-2 * moved)
