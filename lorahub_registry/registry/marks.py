"""What is said of an adapter: its skills and scores, each with where it is known from.

What was read from the adapter's own files (``card``, ``dataset``) is replaced when they are read
again; what the user or a measurement said stays until it is taken back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import and_, delete, insert, select
from sqlalchemy.engine import Connection

from lorahub_registry.registry import columns
from lorahub_registry.registry.engine import insert_many
from lorahub_registry.registry.records import AdapterRecord, ScoreRecord, SkillRecord
from lorahub_registry.registry.schema import Adapter, AdapterSkill, Score, Skill

_READ = frozenset({"card", "dataset"})
Skills = dict[tuple[str, str], str]
"""(name, source) → evidence"""
Scores = dict[columns.ScoreKey, ScoreRecord]


class Marks:
    """Writes skills and scores, within one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._skill_ids: dict[str, int] = {}

    def skills_of(self, record: AdapterRecord) -> Skills:
        """A record's skills; of two with the same source the first one's evidence counts."""
        found: Skills = {}
        for skill in record.skills:
            name = skill_name(skill.name)
            if name:
                found.setdefault((name, skill.source), columns.clean(skill.evidence))
        return found

    def scores_of(self, record: AdapterRecord) -> Scores:
        """A record's scores; of two of the same thing the last one counts."""
        return {
            columns.score_key(s): columns.check_score(s, record.repo.name) for s in record.scores
        }

    def skill_rows(
        self, adapter_id: int, family_id: int | None, downloads: int, skills: Skills
    ) -> list[dict[str, Any]]:
        """The rows to insert."""
        return [
            {
                "adapter_id": adapter_id,
                "skill_id": self._skill_id(name),
                "source": source,
                "evidence": evidence,
                "family_id": family_id,
                "downloads": downloads,
            }
            for (name, source), evidence in skills.items()
        ]

    def score_rows(self, adapter_id: int, scores: Scores) -> list[dict[str, Any]]:
        """The rows to insert."""
        return [{"adapter_id": adapter_id, **vars(score)} for score in scores.values()]

    def insert(self, skills: list[dict[str, Any]], scores: list[dict[str, Any]]) -> None:
        """Insert rows."""
        insert_many(self._connection, AdapterSkill.__table__, skills)
        insert_many(self._connection, Score.__table__, scores)

    def revise(
        self, adapter_id: int, family_id: int | None, downloads: int, record: AdapterRecord
    ) -> bool:
        """Bring skills and scores to what ``record`` says, and whether anything changed."""
        old = self._skills(adapter_id)
        new = {key: e for key, e in old.items() if key[1] not in _READ} | self.skills_of(record)
        old_scores = self._scores(adapter_id)
        kept = {key: s for key, s in old_scores.items() if s.source not in _READ}
        new_scores = kept | self.scores_of(record)
        self._drop_skills(adapter_id, [k for k, e in old.items() if new.get(k) != e])
        self._drop_scores(adapter_id, [k for k, s in old_scores.items() if new_scores.get(k) != s])
        self.insert(
            self.skill_rows(
                adapter_id, family_id, downloads, {k: e for k, e in new.items() if old.get(k) != e}
            ),
            self.score_rows(
                adapter_id, {k: s for k, s in new_scores.items() if old_scores.get(k) != s}
            ),
        )
        return new != old or new_scores != old_scores

    def forget_measured(self, adapter_id: int) -> None:
        """Drop the scores that were measured here, on tensors that are no longer there."""
        measured = [k for k, s in self._scores(adapter_id).items() if s.source == "measured"]
        self._drop_scores(adapter_id, measured)

    def copy_user_skills(self, source_id: int, target_id: int) -> None:
        """Say of one adapter what the user said of another."""
        said = {key: e for key, e in self._skills(source_id).items() if key[1] == "user"}
        self.add_skills(target_id, [SkillRecord(name, "user", e) for (name, _), e in said.items()])

    def add_skills(self, adapter_id: int, skills: Iterable[SkillRecord]) -> bool:
        """Add skills, and whether one was new."""
        old = self._skills(adapter_id)
        new: Skills = {(skill_name(s.name), s.source): columns.clean(s.evidence) for s in skills}
        new = {key: evidence for key, evidence in new.items() if key not in old}
        family_id, downloads = self._connection.execute(
            select(Adapter.family_id, Adapter.downloads).where(Adapter.id == adapter_id)
        ).one()
        self.insert(self.skill_rows(adapter_id, family_id, downloads, new), [])
        return bool(new)

    def remove_skills(self, adapter_id: int, names: Iterable[str]) -> list[str]:
        """Take skills away, whatever their source; which of them were there."""
        wanted = {skill_name(name) for name in names}
        old = [key for key in self._skills(adapter_id) if key[0] in wanted]
        self._drop_skills(adapter_id, old)
        return sorted({name for name, _source in old})

    def add_score(self, adapter_id: int, score: ScoreRecord) -> bool:
        """Add or replace one score, and whether anything changed."""
        key = columns.score_key(score)
        old = self._scores(adapter_id).get(key)
        if old == score:
            return False
        if old is not None:
            self._drop_scores(adapter_id, [key])
        self.insert([], self.score_rows(adapter_id, {key: score}))
        return True

    def _skill_id(self, name: str) -> int:
        if name not in self._skill_ids:
            found = self._connection.scalar(select(Skill.id).where(Skill.name == name))
            if found is None:
                made = self._connection.execute(insert(Skill).values(name=name))
                assert made.inserted_primary_key is not None
                found = int(made.inserted_primary_key[0])
            self._skill_ids[name] = found
        return self._skill_ids[name]

    def _skills(self, adapter_id: int) -> Skills:
        query = (
            select(Skill.name, AdapterSkill.source, AdapterSkill.evidence)
            .join(Skill, Skill.id == AdapterSkill.skill_id)
            .where(AdapterSkill.adapter_id == adapter_id)
        )
        return {(name, source): e for name, source, e in self._connection.execute(query)}

    def _scores(self, adapter_id: int) -> Scores:
        names = list(ScoreRecord.__dataclass_fields__)
        query = select(*(getattr(Score, name) for name in names)).where(
            Score.adapter_id == adapter_id
        )
        scores = (ScoreRecord(*row) for row in self._connection.execute(query))
        return {columns.score_key(score): score for score in scores}

    def _drop_skills(self, adapter_id: int, keys: Iterable[tuple[str, str]]) -> None:
        for name, source in keys:
            self._connection.execute(
                delete(AdapterSkill).where(
                    AdapterSkill.adapter_id == adapter_id,
                    AdapterSkill.skill_id == self._skill_id(name),
                    AdapterSkill.source == source,
                )
            )

    def _drop_scores(self, adapter_id: int, keys: Iterable[columns.ScoreKey]) -> None:
        for key in keys:
            fields = ("task", "metric", "dataset", "few_shot", "source", "revision")
            same = (
                getattr(Score, name).is_not_distinct_from(value)
                for name, value in zip(fields, key, strict=True)
            )
            self._connection.execute(
                delete(Score).where(Score.adapter_id == adapter_id, and_(*same))
            )


def skill_name(text: str) -> str:
    """A skill's name as it is stored: one line, lower case."""
    return " ".join(columns.clean(text).lower().split())
