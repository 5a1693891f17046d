"""Records for the tests: an adapter in one line, whatever is not said being plausible."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

from lorahub_registry.registry.records import (
    AdapterRecord,
    BaseRecord,
    CentroidRecord,
    FileRecord,
    MemberRecord,
    MixtureRecord,
    RepoRecord,
    SkillRecord,
)

FIRST = "a" * 40
SECOND = "b" * 40
MISTRAL = "mistralai/Mistral-7B-v0.1"


def hub(name: str, commit: str = FIRST, **fields: Any) -> RepoRecord:
    """A Hub repo."""
    said = {"last_modified": datetime(2024, 5, 1, tzinfo=UTC), "license": "apache-2.0"} | fields
    return RepoRecord(kind="hub", name=name, commit=commit, **said)


def skills(*names: str, source: Any = "card") -> tuple[SkillRecord, ...]:
    """Skills from one source."""
    return tuple(SkillRecord(name, source, f"tag {name}") for name in names)


def adapter(
    repo: RepoRecord | str = "bob/code-lora", *, base: BaseRecord | str = MISTRAL, **fields: Any
) -> AdapterRecord:
    """An adapter of a Hub repo, listed and not pulled."""
    repo = hub(repo) if isinstance(repo, str) else repo
    base = BaseRecord(base, "declared", base) if isinstance(base, str) else base
    said: dict[str, Any] = {
        "name": repo.name.rsplit("/", 1)[-1],
        "revision": repo.commit,
        "task_type": "CAUSAL_LM",
        "rank": 16,
        "ranks": {16: 2},
        "alpha": 32.0,
        "targets": ("q_proj", "v_proj"),
        "parameters": 1000,
        "dtype": "bfloat16",
        "bytes": 2000,
        "weights": "listed",
        "description": "writes Python",
        "config": {"peft_type": "LORA", "r": 16, "target_modules": ["q_proj", "v_proj"]},
        "modules": (
            {"name": "model.layers.0.self_attn.q_proj", "rank": 16, "in": 64, "out": 64},
            {"name": "model.layers.0.self_attn.v_proj", "rank": 16, "in": 64, "out": 64},
        ),
        "files": (FileRecord("adapter_model.safetensors", 2000, None),),
        "skills": skills("code"),
    }
    return AdapterRecord(repo=repo, base=base, **(said | fields))


def local(path: str, **fields: Any) -> AdapterRecord:
    """An adapter in a folder."""
    said = {"name": path.rsplit("/", 1)[-1], "weights": "local", "local_path": path}
    return adapter(RepoRecord(kind="local", name=path), revision="", **(said | fields))


def centroid(*values: float, **fields: Any) -> CentroidRecord:
    """Where an adapter's rows lie."""
    said: dict[str, Any] = {
        "base": MISTRAL,
        "base_digest": "sha256:base",
        "layer": 2,
        "template": "{{ input }} ",
        "rows": 128,
        "rows_digest": "sha256:rows",
        "vector": struct.pack(f"<{len(values or 'ab')}f", *(values or (0.5, -2.0))),
    }
    return CentroidRecord(**(said | fields))


def mixture(name: str, *members: MemberRecord, digest: str = "d1") -> MixtureRecord:
    """How a mixture came about."""
    return MixtureRecord(
        name=name,
        method="learn",
        recipe_yaml=f"version: 1\nname: {name}\n",
        recipe_digest=digest,
        seed=7,
        verdict="better than every single adapter",
        members=members,
    )
