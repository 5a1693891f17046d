"""Where prompts lie: judged one by one and without padding, on three kinds of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub_registry.errors import UsageError
from lorahub_registry.evaluate.base import load_base
from lorahub_registry.evaluate.hidden import centroid, layers, middle_layer, prompt_vectors
from lorahub_registry.runtime.nearest import nearest
from tests import tiny


def prompts(base: Any, count: int = 9) -> list[list[int]]:
    return [base.tokenizer(text)["input_ids"] for text, _ in tiny.rows(count)]


def alone(base: Any, ids: list[int], layer: int) -> torch.Tensor:
    model = base.model.get_encoder() if base.seq2seq else base.model
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return torch.as_tensor(found.hidden_states[layer][0]).double().mean(0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("layer", [None, 1, 2])
def test_a_prompt_lies_where_it_does_alone(
    request: pytest.FixtureRequest, kind: str, layer: int | None
) -> None:
    base = request.getfixturevalue(f"tiny_{kind}").base()
    rows = prompts(base)
    found = prompt_vectors(base, rows, layer)
    assert found.shape == (len(rows), 32)
    assert found.dtype == torch.float32
    for vector, ids in zip(found, rows, strict=True):
        wanted = alone(base, ids, middle_layer(base) if layer is None else layer)
        assert torch.allclose(vector.double(), wanted, atol=2e-5 * float(wanted.abs().max()))


def test_the_embeddings_are_layer_0(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    [ids] = prompts(base, 1)
    wanted = base.model.get_input_embeddings()(torch.tensor(ids)).mean(0)
    assert torch.allclose(prompt_vectors(base, [ids], 0)[0], wanted, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_told(tiny_llama: tiny.Tiny, layer: int) -> None:
    base = tiny_llama.base()
    assert layers(base) == 2
    with pytest.raises(UsageError, match=f"no hidden state {layer}"):
        prompt_vectors(base, prompts(base), layer)


def test_a_centroid_is_the_mean_of_directions(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    rows = prompts(base)
    vectors = prompt_vectors(base, rows)
    wanted = (vectors / vectors.norm(dim=1, keepdim=True)).mean(0)
    assert torch.allclose(centroid(base, rows), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="prompt"):
        centroid(base, [])


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "least"),
    [
        # Measured: 0.675, 0.975, 1, 0.88 and 0.84, 0.96, 1, 0.87. More than a third of zog's
        # prompts hold no name, so that they are plain English.
        ("stories260k", {"zog": 0.6, "arr": 0.95, "upper": 0.99, "shakespeare": 0.8}),
        ("babyllama105", {"zog": 0.75, "arr": 0.93, "upper": 0.99, "shakespeare": 0.8}),
    ],
)
def test_test_prompts_lie_nearest_to_their_own_skill(
    data: Path, name: str, least: dict[str, float]
) -> None:
    base = load_base(data / "models" / name, name=name, device="cpu")

    def ids(skill: str, split: str) -> list[list[int]]:
        lines = (data / f"tasks/stories/{skill}/{split}.jsonl").read_text("utf-8").splitlines()
        return [base.tokenizer(json.loads(line)["input"] + " ")["input_ids"] for line in lines]

    centroids = torch.stack([centroid(base, ids(skill, "train")) for skill in least])
    for number, (skill, wanted) in enumerate(least.items()):
        found = nearest(prompt_vectors(base, ids(skill, "test")), centroids, 1, 0.1)
        assert float((found.argmax(1) == number).float().mean()) >= wanted, skill
