"""Base models by name: what family a name says, and which model somebody's local path means.

A name is cut into words, each of one kind:

    mistralai/Mistral-7B-Instruct-v0.2   words: instruct mistral   size: 7b   version: 0.2
    unsloth/mistral-7b-bnb-4bit          words: mistral            size: 7b   ignored: bnb 4bit

A query may leave out version and size. It may not leave out a word: ``mistral-7b`` is not the
instruct model, nor a model that somebody fine-tuned and named after it. Organisations, and words
that say how a model is packed, are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_IGNORED = frozenset(
    # how it is packed
    """hf bnb nf4 fp4 4bit 8bit 2bit 3bit 5bit 6bit int4 int8 w4a16 w8a8 w8a16 gptq awq gguf ggml
    exl2 exl3 aqlm hqq eetq mlx fp16 bf16 fp32 fp8 f16 f32 float16 bfloat16 safetensors sharded
    quantized quantised dynamic transformers pytorch torch onnx mirror ungated"""
    # who packed it
    """ unsloth meta facebook google microsoft mistralai huggingface thebloke community"""
    # the plain, pretrained one: what a name without a variant means anyway
    """ base pt pretrained""".split()
)
# Last parts of a path that name a place and not a model.
_NAMELESS = re.compile(
    r"(checkpoint|ckpt|step|epoch|run|version|v)?[-_ ]?\d*\Z"
    r"|(model|models|base|base[-_]?model|output|outputs|out|merged([-_]model)?|final([-_]model)?"
    r"|transformers?|default|pytorch|hf|weights|snapshots?|main|best|last|data)\Z",
    re.IGNORECASE,
)
# First parts of a path that say whose machine it was; the part after these names a person.
_HOMES = frozenset({"home", "users", "mnt", "media", "nfs", "scratch"})
_PLACES = frozenset(
    """root tmp temp var usr opt srv data workspace workspaces content kaggle input working drive
    mydrive gdrive local share cache volumes dbfs s3 gs work project projects""".split()
)
_LOCAL_ROOTS = frozenset(
    """model models checkpoint checkpoints ckpt ckpts output outputs out weights pretrained data
    base_model base_models base hf_models llm llms runs results tmp""".split()
)
_SIZE = re.compile(r"(?:e|a)?\d+(?:\.\d+)?[bmk]\Z|\d+x\d+(?:\.\d+)?[bm]\Z")
_VERSION = re.compile(r"v?\d+(?:\.\d+)*\Z")
_HUB_CACHE = re.compile(r"models--([^/\\]+)--([^/\\]+)")

Inference = Literal["declared", "inferred", "given", "unknown"]


@dataclass(frozen=True)
class BaseName:
    """A base model's name, cut into its words (lower case, sorted, each once)."""

    words: tuple[str, ...]
    sizes: tuple[str, ...]
    versions: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> BaseName:
        """Cut ``text``: a Hub id, a path or a family name."""
        name = infer_base(text)[0] or ""
        words, sizes, versions = set(), set(), set()
        for word in _words(name.rsplit("/", 1)[-1]):
            if _SIZE.match(word):
                sizes.add(word)
            elif _VERSION.match(word):
                versions.add(word.lstrip("v"))
            elif word not in _IGNORED:
                words.add(word)
        return cls(tuple(sorted(words)), tuple(sorted(sizes)), tuple(sorted(versions)))

    @property
    def key(self) -> str:
        """What all names that may answer one query share: the words alone."""
        return " ".join(self.words)

    def answers(self, query: BaseName) -> bool:
        """Whether a search for ``query`` means this model."""
        return (
            bool(query.words)
            and query.words == self.words
            and (not query.sizes or query.sizes == self.sizes)
            and (not query.versions or query.versions == self.versions)
        )

    def same_model(self, other: BaseName) -> bool:
        """Whether both may name one and the same model: nothing that both say differs.

        A version may be missing on one side (a mirror's name often drops it); then the tensors'
        shapes have to decide.
        """
        return (
            bool(self.words)
            and self.words == other.words
            and self.sizes == other.sizes
            and (self.versions == other.versions or not self.versions or not other.versions)
        )


def infer_base(declared: str | None) -> tuple[str | None, Inference]:
    """The model that ``base_model_name_or_path`` means, and how we know.

    A Hub id is taken as it is (``"declared"``). Of a local path, the model is the id in a Hub
    cache's folder name, else the last part that names a model (``"inferred"``). A path with no
    such part gives ``(None, "unknown")``.
    """
    text = (declared or "").strip()
    if not text:
        return None, "unknown"
    if cached := _HUB_CACHE.search(text):
        return f"{cached[1]}/{cached[2]}", "inferred"
    if not is_local_base(text):
        return text, "declared"
    parts = [p for p in re.split(r"[\\/]+", text) if p not in {"", ".", "..", "~"}]
    if parts and re.fullmatch(r"[A-Za-z]:", parts[0]):
        parts = parts[1:]
    if text[0] in "/\\" or ":" in text[:2]:
        while parts and parts[0].lower() in _PLACES:
            parts = parts[1:]
        if parts and parts[0].lower() in _HOMES:
            parts = parts[2:]
    named = [p for p in parts if not _NAMELESS.match(p)]
    if not named:
        return None, "unknown"
    # "LLAMA/7B" is one name in two folders; ModelScope writes dots as three underscores.
    alone = _SIZE.match(named[-1].lower()) and len(named) > 1
    name = "-".join(named[-2:]) if alone else named[-1]
    return name.replace("___", "."), "inferred"


def is_local_base(text: str) -> bool:
    """Whether a declared base is somebody's path and no Hub id (``owner/name`` or ``name``)."""
    parts = text.split("/")
    return (
        text.startswith(("/", ".", "~"))
        or "\\" in text
        or len(parts) > 2
        or (len(parts) == 2 and (parts[0].lower() in _LOCAL_ROOTS or not parts[1]))
    )


def _words(name: str) -> list[str]:
    """Lower-case words: cut at ``-``, ``_``, spaces, and where a name runs into its version."""
    words = []
    for word in re.split(r"[-_\s+()]+", re.sub(r"(?<=\d)_(?=\d)", ".", name.lower())):
        # qwen2.5 → qwen 2.5, gpt2 → gpt 2; but 7b, 8x7b, 4bit, t5 and v0.1 stay whole.
        joined = re.fullmatch(r"([a-z]{2,})(\d+(?:\.\d+)*)", word)
        if joined and word not in _IGNORED:
            words += [joined[1], joined[2]]
        elif word:
            words.append(word)
    return words
