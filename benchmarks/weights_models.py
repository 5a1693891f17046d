"""Synthetic models for the benchmarks of weight work, written some rows at a time.

Numbers are random, taken from a pool that is drawn once: what they are matters to no time, only
how a difference's singular values fall, and that is made as fine-tuned models have it: a low-rank
part with a decaying spectrum, and a floor of noise under it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorahub_registry.weights.files import save_adapter
from lorahub_registry.weights.lowrank import LowRank
from lorahub_registry.weights.stream.shards import Planned, Shards

POOL = (1 << 22) + 4099  # entries; no multiple of any width, so that no two rows of a weight agree
ROWS = 1 << 21  # entries that are made at a time
WEIGHT, CHANGE = 0.02, 0.02
"""Standard deviation of the base's weights; norm of the difference as a share of theirs."""
SPECTRUM, DECAY, NOISE = 512, 0.5, 0.5
"""Ranks of the low-rank part; its n-th singular value is n to minus this; the noise's energy."""


def delta(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A difference [rows, columns], float32, half of its energy noise: norm √(rows·columns)."""
    random = torch.Generator().manual_seed(seed)
    rank = min(SPECTRUM, rows // 4, columns // 4)
    values = torch.arange(1, rank + 1, dtype=torch.float32).pow(-DECAY)
    values *= (((1 - NOISE) * rows * columns) ** 0.5) / values.norm()
    # Gaussian columns are nearly orthogonal, each of about the norm that it is divided by.
    left = torch.randn(rows, rank, generator=random) * (values / (rows * columns) ** 0.5)
    found = torch.randn(rows, columns, generator=random).mul_(NOISE**0.5)
    return found.addmm_(left, torch.randn(rank, columns, generator=random))


def write_pairs(place: Path, shapes: Mapping[str, tuple[int, int]], seed: int) -> tuple[Path, Path]:
    """Two folders with nothing but these matrices of a Llama's first layer, bfloat16.

    Args:
        shapes: module → (fan_out, fan_in).
    """
    config = _llama(4096, 14336, 1, 8)
    plan = [Planned(f"{m}.weight", torch.bfloat16, shape) for m, shape in shapes.items()]
    folders = place / "base", place / "tuned"
    random = torch.Generator().manual_seed(seed)
    base = {p.name: (WEIGHT * torch.randn(p.shape, generator=random)).bfloat16() for p in plan}
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        with Shards(folder, {"model.safetensors": plan}, {}) as shards:
            for number, p in enumerate(plan):
                if folder is folders[1]:
                    change = WEIGHT * CHANGE * delta(*p.shape, seed + 1 + number)
                    shards.put(p.name, (base[p.name].float() + change).bfloat16())
                else:
                    shards.put(p.name, base[p.name])
            shards.finish()
    return folders


def write_models(place: Path, size: int, seed: int, *, quick: bool = False) -> tuple[Path, Path]:
    """A sharded Llama of about ``size`` bytes and its tuned twin, bfloat16, a few rows at a time.

    Every parameter of the twin differs: by a matrix of rank 8 and noise.
    """
    hidden, intermediate, vocabulary = (512, 1792, 4000) if quick else (4096, 14336, 32000)
    layer = [p for p in _planned(hidden, intermediate, 1, 0) if ".layers." in p.name]
    head = 2 * 2 * vocabulary * hidden
    layers = max(1, round((size - head) / sum(p.bytes for p in layer)))
    layout = _sharded(_planned(hidden, intermediate, layers, vocabulary), size // 4)
    folders = place / "base", place / "tuned"
    for folder in folders:
        folder.mkdir(parents=True)
        config = _llama(hidden, intermediate, layers, vocabulary)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    random = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL, generator=random)
    metadata = {file: {"format": "pt"} for file in layout}
    with (
        Shards(folders[0], layout, metadata, {}) as base,
        Shards(folders[1], layout, metadata, {}) as tuned,
    ):
        for p in (p for tensors in layout.values() for p in tensors):
            columns = p.shape[1] if len(p.shape) > 1 else 1
            step = max(1, ROWS // columns)
            right = torch.randn(8, columns, generator=random) / 8**0.5
            for begin in range(0, p.shape[0], step):
                shape = min(step, p.shape[0] - begin), columns
                count = shape[0] * columns
                at = torch.randint(0, POOL - count, (2,), generator=random).tolist()
                rows = pool[at[0] : at[0] + count].view(shape) * WEIGHT
                change = pool[at[1] : at[1] + count].view(shape) * NOISE**0.5
                change.addmm_(torch.randn(shape[0], 8, generator=random), right, alpha=NOISE**0.5)
                rows += float(len(p.shape) == 1)  # norms
                own = p.shape[1:]
                base.put(p.name, rows.bfloat16().view(-1, *own), begin)
                rows.add_(change, alpha=WEIGHT * CHANGE)
                tuned.put(p.name, rows.bfloat16().view(-1, *own), begin)
        base.finish()
        tuned.finish()
    return folders


def write_adapter(base: Path, place: Path, rank: int, seed: int) -> Path:
    """A LoRA of this rank on all linear modules of the layers, bfloat16."""
    config = json.loads((base / "config.json").read_text("utf-8"))
    random = torch.Generator().manual_seed(seed)
    deltas = {}
    for p in _planned(
        config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], 0
    ):
        if ".layers." in p.name and len(p.shape) == 2:
            rows, columns = p.shape
            a = torch.randn(rank, columns, generator=random) / columns**0.5
            deltas[p.name.removesuffix(".weight")] = LowRank(
                a, 0.005 * torch.randn(rows, rank, generator=random)
            )
    place.mkdir()
    save_adapter(
        place, deltas, base="base", base_revision=None, task_type="CAUSAL_LM", dtype="bfloat16"
    )
    return place


def _planned(hidden: int, intermediate: int, layers: int, vocabulary: int) -> list[Planned]:
    """A Llama's tensors in the order in which its shards have them."""
    keys = hidden // 512 * 128
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (vocabulary, hidden)),
    ]
    for n in range(layers):
        shapes += [
            (f"model.layers.{n}.{name}.weight", shape)
            for name, shape in {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        ]
    shapes += [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]
    return [Planned(name, torch.bfloat16, shape) for name, shape in shapes]


def _sharded(tensors: list[Planned], size: int) -> dict[str, list[Planned]]:
    """Files of about ``size`` bytes, in order."""
    files: list[list[Planned]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(p.bytes for p in files[-1]) + tensor.bytes > size:
            files.append([])
        files[-1].append(tensor)
    return {f"model-{n:05}-of-{len(files):05}.safetensors": file for n, file in enumerate(files, 1)}


def _llama(hidden: int, intermediate: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """A Llama's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 512,
        "head_dim": 128, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
