"""Whether a merged model answers as the base with its adapters beside it: both are loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.adapters.compat import Member
from lorahub_registry.api.bases import ResolvedBase
from lorahub_registry.errors import BaseModelError, NotApplied
from lorahub_registry.progress import Progress, silent

if TYPE_CHECKING:
    import torch

_ROWS, _LENGTH = 4, 24
# Of the logits' scale: what float32 makes of sums in another order, through many layers.
_NOISE = 1e-4
# Of what rounding does to the logits: a number that lies between two steps may go either way.
_EITHER_WAY = 0.25


def check_merged(
    folder: Path, base: ResolvedBase, members: Sequence[Member], *, progress: Progress = silent
) -> dict[str, Any]:
    """Compare the logits of the model in ``folder`` with the unmerged model's, in float32.

    The yardstick is the same sum, made in a loaded model and rounded to the types that are stored:
    the written file may differ from it by float32's noise and no more. One model is in memory at a
    time, in float32 on the CPU, and of the adapted modules a copy.

    Args:
        members: with their coefficients.

    Returns:
        ``largest_difference``: from the unmerged model's logits, as a part of the logits' scale;
        ``explained``: how much of it rounding to the stored types makes; ``effect``: how far the
        unmerged model's logits are from the base's.

    Raises:
        NotApplied: the file answers as the base does, or otherwise than it should.
        BaseModelError: a model that cannot be loaded.
    """
    assert base.folder is not None
    with progress.task("Checking: the base with its adapters"):
        plain, exact, rounded = _unmerged(base, members, folder)
    with progress.task("Checking: the merged model"):
        merged = _logits(_load(folder, "the merged model"))
    scale = float(exact.abs().max())
    difference = float((merged - exact).abs().max()) / scale
    explained = float((rounded - exact).abs().max()) / scale
    unexplained = float((merged - rounded).abs().max()) / scale
    if bool((merged == plain).all()):
        raise NotApplied(
            f"the merged model answers as {base.facts.name} alone does",
            hint="the delta is lost, or the files were damaged: write them again",
        )
    if not unexplained <= _NOISE + _EITHER_WAY * explained:
        raise NotApplied(
            f"the merged model's logits are {difference:.2g} of their scale away from the "
            f"unmerged model's, where rounding explains {explained:.2g}",
            hint="the files were damaged, or the disk is failing: write them again",
        )
    return {
        "largest_difference": difference,
        "explained": explained,
        "effect": float((exact - plain).abs().max()) / scale,
        "tokens": _ROWS * _LENGTH,
    }


def _unmerged(
    base: ResolvedBase, members: Sequence[Member], merged: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the base, of it with the adapters, and of that rounded as ``merged`` is."""
    assert base.folder is not None
    model = _load(base.folder, base.facts.name)
    plain = _logits(model)
    if members[0].facts.config.unsupported or members[0].facts.other_tensors:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what the merge has told already
            wrapped = PeftModel.from_pretrained(model, str(members[0].folder)).eval()
            exact = _logits(wrapped)
            _untie(m.base_layer for m in wrapped.modules() if hasattr(m, "base_layer"))
            model = wrapped.merge_and_unload()
        _round(model, merged)
        return plain, exact, _logits(model)
    with _applied(model, members):
        exact = _logits(model)
        _round(model, merged)
        rounded = _logits(model)
    return plain, exact, rounded


@contextmanager
def _applied(model: Any, members: Sequence[Member]) -> Iterator[None]:
    from lorahub_registry.runtime.apply import applied
    from lorahub_registry.weights.files import load_deltas
    from lorahub_registry.weights.lowrank import weighted_sum

    deltas = weighted_sum(
        [load_deltas(m.folder, m.facts) for m in members],
        [float(m.coefficient or 0) for m in members],
    )
    _untie(model.get_submodule(name) for name in deltas)
    with applied(model, deltas):
        yield


def _untie(modules: Iterable[Any]) -> None:
    """Give each its own weight, so that a sum made in it changes it alone."""
    from torch import nn

    for module in modules:
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)


def _round(model: Any, folder: Path) -> None:
    """Every parameter of ``model`` as the files in ``folder`` can hold it."""
    import torch

    from lorahub_registry.weights.stream.checkpoint import Checkpoint
    from lorahub_registry.weights.stream.skeleton import read_skeleton

    skeleton = read_skeleton(folder)
    with Checkpoint(folder) as stored, torch.no_grad():
        at = skeleton.stored(stored.tensors)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            place = at.get(skeleton.tied.get(name, name))
            if place is not None:
                parameter.copy_(parameter.to(stored.tensors[place].dtype))


def _load(folder: Path, name: str) -> Any:
    import torch
    import transformers
    from safetensors import SafetensorError

    from lorahub_registry.evaluate.quiet import without_bars

    encoder = json.loads((folder / "config.json").read_text("utf-8")).get("is_encoder_decoder")
    kind = transformers.AutoModelForSeq2SeqLM if encoder else transformers.AutoModelForCausalLM
    try:
        with without_bars():
            model = kind.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(f"{name} cannot be loaded: {first}") from error
    return model.eval().requires_grad_(False)


def _logits(model: Any) -> torch.Tensor:
    import torch

    config = model.config.get_text_config()
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (_ROWS, _LENGTH), generator=made)
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits.float()
