"""Listen: the coefficients of a dynamic mixture at every token of one text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorahub_registry.adapters.dynamic import Dynamic
from lorahub_registry.adapters.layer_order import layer_order
from lorahub_registry.api.voices import Line, Voices

if TYPE_CHECKING:
    import torch

    from lorahub_registry.runtime.mixture import Coefficients


def listen(
    model: Any, tokenizer: Any, mixture: Dynamic, prompt: Sequence[int], answer: Sequence[int]
) -> Voices:
    """One forward over prompt and answer, with the coefficients of every module that computes.

    A router of prompts reads the prompt alone, as it does when it runs.

    Modules that see only some of the tokens, as the experts of a base that routes itself, are left
    out.

    Args:
        model: a ``PeftModel`` with the mixture as its active adapter.
        prompt, answer: token ids.
    """
    import torch

    from lorahub_registry.evaluate.nll import keeps_logits
    from lorahub_registry.runtime.layers import MixtureLayer

    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    if mixture.router.site == "prompt":
        answer = []
    ids = list(prompt) if seq2seq else [*prompt, *answer]
    inputs = {"input_ids": [ids]}
    # Of an encoder–decoder the decoder reads the answer behind a token that starts it. A module is
    # known to read one or the other by its number of tokens, so these must differ; what stands at
    # a decoder's end changes nothing before it.
    start = [model.config.decoder_start_token_id, *answer] if seq2seq else []
    if seq2seq:
        inputs["decoder_input_ids"] = [start + start[:1] * (len(start) == len(ids))]
    places = {len(ids): slice(0, len(ids))}
    if seq2seq:
        places[len(inputs["decoder_input_ids"][0])] = slice(len(ids), len(ids) + len(answer))
    total = len(prompt) + len(answer)
    device = next(model.parameters()).device
    given: dict[str, Any] = {k: torch.tensor(v, device=device) for k, v in inputs.items()}
    head = model.get_base_model().get_output_embeddings()
    if not seq2seq and keeps_logits(model) and not isinstance(head, MixtureLayer):
        given["logits_to_keep"] = 1  # nobody looks at them, and they are large
    with torch.inference_mode(), _heard(model, mixture, places, total) as lines:
        model(**given, use_cache=False)
    texts = [*pieces(tokenizer, list(prompt)), *pieces(tokenizer, list(answer))]
    if not seq2seq:
        texts = pieces(tokenizer, ids)
    return Voices(mixture.names, tuple(texts), len(prompt), lines)


@contextmanager
def _heard(
    model: Any, mixture: Dynamic, places: dict[int, slice], total: int
) -> Iterator[dict[str, list[Line | None]]]:
    """Layer → the mean line of each token over the layer's modules, once the block has ended."""
    import torch

    from lorahub_registry.runtime.places import layer_of

    base, experts = model.get_base_model(), len(mixture.experts)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    read: dict[str, torch.Tensor] = {}

    def seen(_: str, module: str, c: Coefficients) -> None:
        values = c.dense(experts).detach().double().cpu().reshape(-1, experts)
        layer = layer_of(module, base) or ""
        if layer not in sums:
            sums[layer], counts[layer] = torch.zeros(2, total, experts, dtype=torch.float64)
            read[layer] = torch.zeros(total, dtype=torch.bool)
        if len(values) == 1 and (mixture.router.site == "prompt" or c.values.dim() == 1):
            place = slice(0, total)
        elif len(values) in places:
            place = places[len(values)]
            # A decoder's first token is no token of the text; its last may be one too many.
            first = 1 if place.start else 0
            values = values[first : first + place.stop - place.start]
        else:
            return
        sits = torch.tensor([rank > 0 for rank in mixture.ranks_on(module)])
        sums[layer][place] += values * sits
        counts[layer][place] += sits.double()
        read[layer][place] = True

    found: dict[str, list[Line | None]] = {}
    with model.watching(seen):
        yield found
    for layer in sorted(sums, key=layer_order):
        lines = (sums[layer] / counts[layer]).tolist()
        there = zip(lines, counts[layer].tolist(), read[layer].tolist(), strict=True)
        found[layer] = [
            tuple(v if n else None for v, n in zip(line, count, strict=True)) if reads else None
            for line, count, reads in there
        ]


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; put together they are the whole.

    A letter that several tokens make stands at the last of them, the others are empty.
    """
    found, start, read = [], 0, 0
    for i in range(1, len(ids) + 1):
        # A few tokens before it, as many tokenizers write a token otherwise at a text's beginning.
        known = _decode(tokenizer, ids[start:read])
        whole = _decode(tokenizer, ids[start:i])
        if i < len(ids) and (whole.endswith("�") or len(whole) <= len(known)):
            found.append("")
            continue
        found.append(whole[len(known) :])
        start, read = read, i
    return found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
