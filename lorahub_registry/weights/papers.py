"""What lies beside a model's weights: configs, tokenizer, templates, license."""

from __future__ import annotations

import re
from pathlib import Path

from lorahub_registry.errors import BaseModelError, OutputError

_WANTED = re.compile(
    r"[\w.-]+\.(json|txt|model|tiktoken|jinja)\Z|(tokenizer|LICENSE|NOTICE)[\w.-]*\Z"
)
_TEMPLATES = "additional_chat_templates"
# Names that fit and do not belong: how it was trained, which weights lie where, what another
# command made; and what would have an adapter put on the model wherever it is loaded.
_UNWANTED = re.compile(
    r"(trainer_state|training_args|(all|train|eval)_results|adapter_config|lorareg)\.json\Z"
    r"|.*\.index\.json\Z|.*\.(bin|pt|pth|ckpt|h5|msgpack|pkl|safetensors|lock|tmp)\Z|\."
)


def copy_papers(source: Path, target: Path) -> list[str]:
    """Copy all of a model but its weights.

    Links are followed; caches, pickles and the state of a training stay behind.

    Args:
        source: a model's folder.
        target: exists already; what is there under these names is written over.

    Returns:
        The names of what is at the top of ``target`` now, sorted.

    Raises:
        BaseModelError: a file cannot be read.
        OutputError: one cannot be written.
    """
    found = [p for p in source.iterdir() if _belongs(p.name) and p.is_file()]
    templates = sorted(p for p in (source / _TEMPLATES).glob("*.jinja") if p.is_file())
    for file in found:
        _copy(file, target / file.name)
    for file in templates:
        _copy(file, target / _TEMPLATES / file.name)
    return sorted({p.name for p in found} | ({_TEMPLATES} if templates else set()))


def _belongs(name: str) -> bool:
    return bool(_WANTED.match(name)) and not _UNWANTED.match(name)


def _copy(file: Path, target: Path) -> None:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BaseModelError(f"{file} cannot be read: {error.strerror}") from None
    try:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}") from None
