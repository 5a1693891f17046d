"""What of a mixture's folder is published, and what must not be in it: secrets, local paths."""

from __future__ import annotations

import json
import re
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorahub_registry.adapters.bases import is_local_base
from lorahub_registry.adapters.config import CONFIG_NAME, parse_config
from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.adapters.readme import read_card
from lorahub_registry.adapters.tensors import WEIGHTS_NAME, read_header
from lorahub_registry.errors import OutputError
from lorahub_registry.hub.discover import LINEAGE, README

NEEDED = (CONFIG_NAME, WEIGHTS_NAME)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b|\bapi_org_[A-Za-z0-9]{16,}\b")
_USERS = re.compile(
    r"(?<![\w.:/-])/(?:home|Users|root|mnt|media|tmp|private/var|var/folders|scratch)/[\w.+@-]+"
    r"|\b[A-Za-z]:(?:\\\\|\\|/)Users(?:\\\\|\\|/)[\w.+@ -]+"
)
_HINT = "write the mixture again without it, or take it out of the file"


@dataclass(frozen=True)
class LocalFile:
    """One file to publish. ``content`` is None for weights, which are read from ``path``."""

    name: str
    path: Path
    size: int
    content: bytes | None = None


def collect(folder: Path, *, token: str | None = None) -> tuple[list[LocalFile], list[str]]:
    """The files to publish, checked, by name; and the names of those that stay here.

    Args:
        token: the user's own, which must not be in any of them.

    Raises:
        OutputError: something is missing, or a file holds what must not be published.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder", hint="give the folder that compose wrote")
    names = sorted(path.name for path in folder.iterdir())
    if missing := [name for name in NEEDED if name not in names]:
        raise OutputError(
            f"{folder}: no {missing[0]} there, so nothing to publish",
            hint="give the folder that compose or convert wrote",
        )
    inner = _inner(folder)
    wanted = [name for name in [*names, *inner] if _is_ours(name)]
    files = [_read(folder, name) for name in sorted(wanted)]
    places = _places(folder)
    for file in files:
        for what in _found(_text(file), token, places):
            raise OutputError(f"{file.path} holds {what}; nothing was published", hint=_HINT)
    _check_bases(files)
    left = [name for name in [*names, *inner] if not _is_ours(name)]
    return files, [name for name in left if not (inner and name == FOLDER)]


def _inner(folder: Path) -> list[str]:
    """What is in the part of a mixture that decides while it runs, and what has to be."""
    if not (folder / FOLDER / CONFIG_NAME).is_file():
        return []
    there = {path.name for path in (folder / FOLDER).iterdir()}
    return sorted(f"{FOLDER}/{name}" for name in there.union(NEEDED))


def _is_ours(name: str) -> bool:
    hidden, inner = name.startswith("."), name.removeprefix(f"{FOLDER}/")
    if inner != name:
        return inner in NEEDED
    return name in {*NEEDED, README, *LINEAGE} or (name.endswith(".png") and not hidden)


def _read(folder: Path, name: str) -> LocalFile:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"{path}: leads out of its folder", hint="put the file itself there")
    if not path.exists():
        raise OutputError(f"{path}: no such file, so no mixture", hint="compose it again")
    if not path.is_file():
        raise OutputError(f"{path}: not a file", hint="take it out of the folder")
    if path.name == WEIGHTS_NAME:
        return LocalFile(name, path, path.stat().st_size)
    content = path.read_bytes()
    return LocalFile(name, path, len(content), content)


def _text(file: LocalFile) -> str:
    """All text of a file: of weights, their names and the writer's remarks."""
    if file.content is None:
        header = read_header(file.path)
        return json.dumps([dict(header.metadata), sorted(header.tensors)], ensure_ascii=False)
    return file.content.decode("utf-8", errors="replace")


def _found(text: str, token: str | None, places: dict[str, str]) -> Iterator[str]:
    """What of it must not be published, in words that do not repeat a secret."""
    if (token and token in text) or _TOKEN.search(text):
        yield "an access token"
    for place, what in places.items():
        if re.search(rf"(?<![\w.-]){re.escape(place)}(?![\w-])", text):
            yield f"{what} ({place})"
    if match := _USERS.search(text):
        yield f"a path of somebody's machine ({match[0]})"


def _places(folder: Path) -> dict[str, str]:
    """The names of this machine's places, and what each one is."""
    found: dict[str, str] = {}
    for path, what in (
        (folder, "the path of the folder"),
        (Path.cwd(), "the path of the current folder"),
        (Path.home(), "the path of your home folder"),
        (Path(tempfile.gettempdir()), "the path of the folder for temporary files"),
    ):
        for spelling in {str(path.absolute()), str(path.resolve())}:
            # "/" and the like are in every text.
            if len(Path(spelling).parts) > 1 and len(spelling) > 4:
                found[spelling] = what
    host = socket.gethostname()
    # A short, plain one may be any word.
    if len(host) > 7 and re.search(r"[\d.-]", host):
        found[host] = "the name of this machine"
    return found


def _check_bases(files: list[LocalFile]) -> None:
    """A base has to be a Hub id; anything else means nothing elsewhere.

    Raises:
        OutputError: it is a path, or the README's front matter cannot be read.
    """
    contents = {file.name: file for file in files}
    for place in (CONFIG_NAME, f"{FOLDER}/{CONFIG_NAME}"):
        if (config := contents.get(place)) is not None:
            base = parse_config(config.content or b"", where=str(config.path)).base
            if base and is_local_base(base):
                raise _local(config, base)
    readme = contents.get(README)
    if readme is None:
        return
    card = read_card((readme.content or b"").decode("utf-8", errors="replace"))
    if card.problem:
        raise OutputError(f"{readme.path}: {card.problem}", hint="correct its first lines")
    declared = card.metadata.get("base_model")
    for name in declared if isinstance(declared, list) else [declared]:
        if name is not None and (not isinstance(name, str) or is_local_base(name)):
            raise _local(readme, str(name))
    for tag in card.tags:
        if tag.startswith("base_model:") and is_local_base(tag.rsplit(":", 1)[-1]):
            raise _local(readme, tag)


def _local(file: LocalFile, base: str) -> OutputError:
    return OutputError(
        f"{file.path} names the base {base!r}, which is no Hub id; nothing was published",
        hint="compose with the base's Hub id (owner/name)",
    )
