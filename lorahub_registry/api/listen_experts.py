"""Listen to a MixLoRA: the weights of its experts at every token of one text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorahub_registry.api.listen import pieces
from lorahub_registry.api.voices import Line, Voices

if TYPE_CHECKING:
    import torch

    from lorahub_registry.runtime.moe import Chosen


def listen_experts(
    model: Any, tokenizer: Any, names: Sequence[str], prompt: Sequence[int], answer: Sequence[int]
) -> Voices:
    """One forward over prompt and answer, with every layer's weights, 0 where an expert is not
    chosen.

    Args:
        model: a ``PeftModel`` with the MixLoRA as its active adapter.
        names: the experts', in their order.
        prompt, answer: token ids.
    """
    import torch

    from lorahub_registry.evaluate.nll import keeps_logits
    from lorahub_registry.runtime.mlp import decoder_layers

    place, _ = decoder_layers(model.get_base_model())
    ids = [*prompt, *answer]
    heard: dict[int, Sequence[Line | None]] = {}

    def seen(
        _: str, layer: int, logits: torch.Tensor, chosen: Chosen, real: torch.Tensor | None
    ) -> None:
        weights = torch.zeros(len(ids), len(names), dtype=torch.float64, device=logits.device)
        weights[chosen.token, chosen.expert] = chosen.weight.double()
        heard[layer] = [tuple(line) for line in weights.tolist()]

    given: dict[str, Any] = {
        "input_ids": torch.tensor([ids], device=next(model.parameters()).device)
    }
    if keeps_logits(model):
        given["logits_to_keep"] = 1  # nobody looks at them, and they are large
    with torch.inference_mode(), model.watching(seen):
        model(**given, use_cache=False)
    layers = {f"{place}.{layer}": heard[layer] for layer in sorted(heard)}
    return Voices(tuple(names), tuple(pieces(tokenizer, ids)), len(prompt), layers)
