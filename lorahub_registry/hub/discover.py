"""Which files a repo holds at a commit, which adapters those are, and what each one needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from huggingface_hub.hf_api import RepoFile

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME
from lorahub_registry.errors import BrokenAdapter, HubError, LoraregError
from lorahub_registry.hub.client import Hub
from lorahub_registry.hub.failures import explained
from lorahub_registry.refs import safe_path

README = "README.md"
# Beside an adapter that lorareg composed or trained: where it comes from and what it was measured
# to do.
LINEAGE = ("recipe.yaml", "factory.yaml", "lorareg.lock", "results.json", "training.jsonl")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repo.

    Attributes:
        sha256: of an LFS file; None for a file that git holds itself.
        git_id: git's id of what it holds: of the content, where it is not LFS.
    """

    path: str
    size: int
    sha256: str | None = None
    git_id: str | None = None


@dataclass(frozen=True)
class RemoteAdapter:
    """One adapter of a repo and the files to get for it (its own, and the repo's README)."""

    subfolder: str
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        """What its files weigh."""
        return sum(file.size for file in self.files)

    @property
    def weights(self) -> str:
        """``safetensors`` or ``pickle``."""
        names = {name_in(self.subfolder, file.path) for file in self.files}
        return "safetensors" if WEIGHTS_NAME in names else "pickle"


@dataclass(frozen=True)
class Refused:
    """Something that was left out, and why."""

    ref: str
    error: LoraregError

    @property
    def reason(self) -> str:
        """Why, as a sentence."""
        return str(self.error)


def list_files(hub: Hub, repo: str, commit: str) -> tuple[RemoteFile, ...]:
    """All files of a repo at a commit, sorted.

    Raises:
        HubError: a name in it tries to leave the repo's folder; or see :mod:`.failures`.
    """
    where = hub.where(repo)
    hub.require_online(where)
    with explained(where):
        entries = hub.api.list_repo_tree(repo, revision=commit, recursive=True)
        files = [
            RemoteFile(e.path, e.size, e.lfs.sha256 if e.lfs else None, e.blob_id)
            for e in entries
            if isinstance(e, RepoFile)
        ]
    check_names(repo, [file.path for file in files])
    return tuple(sorted(files, key=lambda file: file.path))


def check_names(repo: str, names: Iterable[str]) -> None:
    """Refuse a repo with names that no git client makes and that lead out of its folder.

    Raises:
        HubError: there is one.
    """
    for name in names:
        hostile = "\\" in name or any(ord(c) < 32 or ord(c) == 127 for c in name)
        if hostile or any(part in {"", ".", ".."} for part in name.split("/")):
            raise HubError(
                f"{repo} names a file {name[:100]!r}, which leads out of its folder: nothing of "
                "this repo is taken",
                hint="do not use it; report it to the Hub",
            )


def folders_of(names: Iterable[str]) -> list[str]:
    """The folders that hold an ``adapter_config.json``, sorted; ``""`` is the root."""
    return sorted(
        name.removesuffix(CONFIG_NAME).removesuffix("/")
        for name in names
        if name == CONFIG_NAME or name.endswith(f"/{CONFIG_NAME}")
    )


def find_adapters(
    repo: str, files: Sequence[RemoteFile], subfolder: str = "", *, all_files: bool = False
) -> tuple[list[RemoteAdapter], list[Refused]]:
    """The adapters at or below ``subfolder``, and those that cannot be taken.

    Args:
        all_files: take every file of an adapter's folder, not only what an adapter needs.

    Raises:
        HubError: there is none; the message says what is there instead.
    """
    folders = [f for f in folders_of(file.path for file in files) if _inside(f, subfolder)]
    if not folders:
        raise nothing_there(repo, files, subfolder)
    same = Counter(folder.casefold() for folder in folders)
    found, refused = [], []
    for folder in folders:
        ref = f"{repo}/{folder}" if folder else repo
        try:
            if same[folder.casefold()] > 1:
                raise BrokenAdapter(
                    f"{ref}: another folder has that name but for upper and lower case",
                    hint="pull one of them by its own name",
                )
            found.append(RemoteAdapter(folder, _choose(ref, files, folder, all_files)))
        except BrokenAdapter as error:
            refused.append(Refused(ref, error))
    return found, refused


def name_in(folder: str, path: str) -> str | None:
    """The name of ``path`` directly in ``folder``; None where it is elsewhere."""
    name = path.removeprefix(f"{folder}/") if folder else path
    return name if "/" not in name and (not folder or name != path) else None


def nothing_there(repo: str, files: Sequence[RemoteFile], subfolder: str) -> HubError:
    """The error for a repo without adapters: it says what the repo is."""
    everywhere = folders_of(file.path for file in files)
    if subfolder and everywhere:
        some = ", ".join(f or "its root" for f in everywhere[:8])
        more = f" and {len(everywhere) - 8} more" if len(everywhere) > 8 else ""
        return HubError(
            f"{repo} has no adapter in {subfolder}", hint=f"it has adapters in {some}{more}"
        )
    what, hint = _what_it_is([file.path for file in files])
    return HubError(f"{repo} holds no adapter: no {CONFIG_NAME} anywhere; {what}", hint=hint)


def _what_it_is(names: list[str]) -> tuple[str, str]:
    last = [name.rsplit("/", 1)[-1] for name in names]
    if not names:
        return "it is empty", "is that the right revision?"
    if "pytorch_lora_weights.safetensors" in last:
        return "it is a diffusers LoRA", "lorareg takes PEFT adapters of language models"
    if "adapters.safetensors" in last or "adapters.npz" in last:
        return "it is an MLX adapter", "lorareg takes PEFT adapters: convert it with mlx-lm first"
    if any(name.endswith(".gguf") for name in last):
        return "it is a model in GGUF files", "look for the adapter it was made from"
    if "config.json" in last:
        return (
            "it is a whole model",
            "name it as the base of a recipe; an adapter of it is in another repo",
        )
    if WEIGHTS_NAME in last or PICKLE_NAME in last:
        return "it has adapter weights without their config", "ask its owner for the config"
    return f"it has {', '.join(sorted(names)[:5])}", "is that the right repo and revision?"


def _inside(folder: str, subfolder: str) -> bool:
    return not subfolder or folder == subfolder or folder.startswith(f"{subfolder}/")


def _choose(
    ref: str, files: Sequence[RemoteFile], folder: str, all_files: bool
) -> tuple[RemoteFile, ...]:
    """The files of the adapter in ``folder``.

    A pickle is taken only where there is nothing else; it is never read here.

    Raises:
        BrokenAdapter: no weights, or a name that not every system can store.
    """
    own = {name: file for file in files if (name := name_in(folder, file.path)) is not None}
    weights = WEIGHTS_NAME if WEIGHTS_NAME in own else PICKLE_NAME
    if weights not in own:
        raise BrokenAdapter(
            f"{ref}: no {WEIGHTS_NAME} beside its {CONFIG_NAME}",
            hint="the upload was not finished, or the weights are elsewhere",
        )
    names = (CONFIG_NAME, weights, README, *LINEAGE)
    chosen = {own[name].path: own[name] for name in names if name in own}
    if all_files:
        chosen |= {f.path: f for f in files if _inside(f.path, folder) and safe_path(f.path)}
    chosen |= {file.path: file for file in files if file.path == README}
    for path in chosen:
        if not safe_path(path):
            raise BrokenAdapter(f"{ref}: {path!r} is a name that not every system can store")
    return tuple(chosen[path] for path in sorted(chosen))
