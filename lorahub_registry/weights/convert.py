"""From pickled tensors to safetensors, in a child process.

The one place in the project that unpickles. The child runs ``torch.load(weights_only=True)``,
which builds tensors and nothing else, under limits of time and memory; the parent takes only the
safetensors file that it wrote, and checks it: an adapter's against its config.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.facts import AdapterFacts, facts_of, read_config
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME, read_header
from lorahub_registry.errors import BrokenAdapter, OutputError, UnknownRef

_CHILD = """
import sys
source, target, memory = sys.argv[1], sys.argv[2], int(sys.argv[3])
import torch
from safetensors.torch import save_file
if memory:
    import resource
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
loaded = torch.load(source, map_location="cpu", weights_only=True)
if not isinstance(loaded, dict) or not all(
    isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
):
    sys.exit("it holds something else than named tensors")
tensors = {k: v.detach().clone().contiguous() for k, v in loaded.items()}
save_file(tensors, target, metadata={"format": "pt"})
"""


def convert(
    folder: Path,
    *,
    into: Path | None = None,
    timeout_s: float = 600.0,
    memory: int | None = None,
) -> AdapterFacts:
    """Write ``adapter_model.safetensors`` beside the ``.bin`` in ``folder``; the pickle stays.

    Args:
        into: write it there instead, with a copy of the config; the folder exists already.
        timeout_s: seconds after which the child is killed.
        memory: bytes that the child may take; by default four times the file and 4 GiB.

    Returns:
        What the adapter is, now that its tensors can be read.

    Raises:
        UnknownRef: there is no pickle.
        OutputError: the safetensors exist already, or the folder cannot be written.
        BrokenAdapter: the pickle is damaged, holds more than tensors, or is not the config's.
    """
    config = read_config(folder)
    source, target = folder / PICKLE_NAME, (into or folder) / WEIGHTS_NAME
    if target.exists():
        raise OutputError(f"{target} is there already", hint="nothing to convert")
    if not source.is_file():
        raise UnknownRef(f"{folder}: no {PICKLE_NAME} to convert")
    if "enable_lora" in config.unsupported:
        raise BrokenAdapter(
            f"{source}: a merged LoRA of PEFT before 0.3 (enable_lora), whose B is laid out "
            "otherwise; PEFT cannot load it either"
        )
    with unpickled(source, beside=target.parent, timeout_s=timeout_s, memory=memory) as part:
        facts = facts_of(config, read_header(part), where=str(source))
        if into is not None:
            shutil.copyfile(folder / CONFIG_NAME, into / CONFIG_NAME)
        os.chmod(part, 0o644)
        os.replace(part, target)
        return facts


@contextmanager
def unpickled(
    source: Path, *, beside: Path, timeout_s: float = 600.0, memory: int | None = None
) -> Iterator[Path]:
    """A pickle's tensors as a safetensors file in ``beside``, which goes at the end of the block.

    Args:
        timeout_s, memory: see :func:`convert`.

    Raises:
        OutputError: ``beside`` cannot be written.
        BrokenAdapter: the pickle is damaged, or holds more than named tensors.
    """
    try:
        handle, part = tempfile.mkstemp(dir=beside, prefix=".convert.", suffix=".safetensors")
        os.close(handle)
    except OSError as error:
        raise OutputError(f"{beside} cannot be written: {error.strerror}") from None
    try:
        _run(source, Path(part), timeout_s, memory or 4 * source.stat().st_size + (4 << 30))
        yield Path(part)
    finally:
        Path(part).unlink(missing_ok=True)


def _run(source: Path, target: Path, timeout_s: float, memory: int) -> None:
    limit = memory if sys.platform == "linux" else 0
    # -I: neither the current folder nor PYTHON* variables decide what is imported.
    command = [sys.executable, "-I", "-c", _CHILD, str(source), str(target), str(limit)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise BrokenAdapter(
            f"{source}: not read within {timeout_s:.0f} s; given up", hint="raise --timeout"
        ) from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise BrokenAdapter(
            f"{source}: cannot be read as tensors: {_first_words(said)}",
            hint="it is damaged, or a pickle that would run code; ask its author for safetensors",
        )


def _first_words(lines: list[str]) -> str:
    """The child's own reason: the exception's first line, without its advice."""
    for line in lines:
        head, colon, rest = line.partition(": ")
        if colon and not line.startswith(" ") and head.replace(".", "").replace("_", "").isalnum():
            return rest.split(". ")[0][:200] or head
    return lines[-1][:200]
