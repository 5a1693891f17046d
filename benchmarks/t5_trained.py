"""20 trained modules on a T5 in t5-small's shape, made here, so that a search meets real deltas.

There is no text in it. A topic is a distribution over 64 words: eight of its own, in descending
shares, take nine tenths. A row is words of a topic: the prompt, and an output of three to seven
more and EOS. The base (60M parameters, initialised at random) is trained for some steps on words
of no topic, then each module (LoRA, rank 16 on q and v, as published) on one topic. A task's words
come from a few topics in given shares: no module has seen it, and a mixture of theirs helps.

It is made once for a seed, some minutes at two threads, and kept in a folder.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from t5_modules import ALPHA, MODULES, RANK, make_base
from torch import nn
from torch.nn import functional

from lorahub_registry.evaluate.tokens import Encoded

WORDS, FIRST, OWN, EOS = 64, 100, 8, 1
TASKS = {
    "one": ((5, 1.0),),
    "two": ((0, 0.6), (1, 0.4)),
    "three": ((2, 0.4), (3, 0.35), (4, 0.25)),
}
"""Task → the topics that its words come from, and their shares."""
PROMPT_TOKENS, EXAMPLES = 166, 5
BASE_STEPS, MODULE_STEPS, BATCH, TRAIN_PROMPT = 60, 24, 8, 16


def make(folder: Path, seed: int, *, quick: bool = False) -> tuple[Path, list[Path]]:
    """(the base's folder, the modules' folders), made where they are not there yet."""
    base_folder, done = folder / "base", folder / "done.json"
    folders = [folder / f"module-{n:02}" for n in range(MODULES)]
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.perf_counter()
        base = make_base(seed).train().requires_grad_(True)
        _drop_nothing(base)
        every = topics(seed)
        random = torch.Generator().manual_seed(seed + 1)
        none = torch.full((WORDS,), 1 / WORDS)
        losses = {"base": _train(base, none, 3 if quick else BASE_STEPS, 1e-3, random)}
        base.eval().requires_grad_(False)
        base.save_pretrained(base_folder)
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"
        )
        for n, place in enumerate(folders):
            torch.manual_seed(seed + 2 + n)
            model = get_peft_model(copy.deepcopy(base), config)
            model.peft_config["default"].base_model_name_or_path = str(base_folder)
            steps = 2 if quick else MODULE_STEPS
            losses[place.name] = _train(model, every[n], steps, 3e-3, random)
            model.save_pretrained(place)
            print(
                place.name, losses[place.name], f"{time.perf_counter() - begin:.0f} s", flush=True
            )
        done.write_text(json.dumps({"seconds": time.perf_counter() - begin, "losses": losses}))
    return base_folder, folders


def topics(seed: int) -> torch.Tensor:
    """Each module's distribution over words, [modules, words]."""
    random = torch.Generator().manual_seed(seed + 100)
    found = torch.full((MODULES, WORDS), 0.1 / WORDS)
    shares = 0.8 ** torch.arange(OWN, dtype=torch.float32)
    for topic in found:
        topic[torch.randperm(WORDS, generator=random)[:OWN]] += 0.9 * shares / shares.sum()
    return found


def task_rows(name: str, seed: int, count: int = EXAMPLES) -> list[Encoded]:
    """Rows of a task: prompts of 166 tokens, as LoraHub's are in the mean."""
    all_topics = topics(seed)
    topic = torch.stack([share * all_topics[n] for n, share in TASKS[name]]).sum(0)
    random = torch.Generator().manual_seed(seed + 200 + list(TASKS).index(name))
    rows = []
    for n in range(count):
        words = _words(topic, 1, PROMPT_TOKENS + 7, random)[0].tolist()
        head, tail = words[: PROMPT_TOKENS - 1], words[PROMPT_TOKENS - 1 :]
        rows.append(Encoded([*head, EOS], [*tail[: 3 + n % 5], EOS]))
    return rows


def _words(topic: torch.Tensor, rows: int, length: int, random: torch.Generator) -> torch.Tensor:
    drawn = torch.multinomial(topic, rows * length, replacement=True, generator=random)
    return drawn.view(rows, length) + FIRST


def _batch(topic: torch.Tensor, random: torch.Generator) -> dict[str, torch.Tensor]:
    words = _words(topic, BATCH, TRAIN_PROMPT + 7, random)
    end = torch.full((BATCH, 1), EOS)
    return {
        "input_ids": torch.cat([words[:, :TRAIN_PROMPT], end], 1),
        "labels": torch.cat([words[:, TRAIN_PROMPT:], end], 1),
    }


def _train(
    model: nn.Module, topic: torch.Tensor, steps: int, rate: float, random: torch.Generator
) -> list[float]:
    """Some steps of Adam; the loss at the beginning and at the end, each the mean of three."""
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=rate)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10)
        batch = _batch(topic, random)
        logits = model(**batch, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return [round(sum(part) / len(part), 3) for part in (losses[:3], losses[-3:])]


def _drop_nothing(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
