"""From checked adapters, a loaded base and rows to a written and proven mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorahub_registry import __version__
from lorahub_registry.adapters.compat import Member
from lorahub_registry.compose.forms import DeltaForm, FactorForm, Form
from lorahub_registry.compose.learn import Learned, learn
from lorahub_registry.compose.prove import Proof, TestSet, check_text, prove
from lorahub_registry.compose.write import Written, check_applied, write_mixture
from lorahub_registry.errors import DataError, IncompatibleAdapters, NotApplied
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.generation import NORMALISATION
from lorahub_registry.evaluate.tokens import Batch, Encoded, TokenRule, batches, encode
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.learned import Learn, LoraHub
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.recipes.rows import Row, overlap
from lorahub_registry.recipes.template import render
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import Deltas, weighted_sum


@dataclass(frozen=True)
class Rows:
    """The recipe's rows, read; empty where the recipe brings none."""

    train: Sequence[Row] = ()
    test: Sequence[Row] = ()


@dataclass(frozen=True)
class Composition:
    """What came out.

    Attributes:
        coefficients: by member name, in the recipe's order.
        proof: None where the recipe has no test rows.
        tokens: how rows became tokens, with how many prompts were cut.
        change: largest change of a label's loss that the written adapter makes, in nats.
    """

    coefficients: dict[str, float]
    written: Written
    change: float
    tokens: dict[str, Any]
    learned: Learned | None = None
    proof: Proof | None = None
    overlap: int = 0
    notes: list[str] = field(default_factory=list)


def compose(
    recipe: Recipe,
    members: Sequence[Member],
    base: LoadedBase,
    rows: Rows,
    folder: Path,
    *,
    progress: Progress = silent,
) -> Composition:
    """Mix, write into ``folder`` (which exists and is empty), check and prove.

    Raises:
        NotApplied: the mixture would change nothing, or PEFT computes something else from it.
        BrokenAdapter: a member's tensors are not finite.
        DataError: rows that cannot be tokenised.
    """
    _check_modules(members, base)
    encoder = _Encoder(recipe, base, progress)
    train, test = encoder(rows.train, "train"), encoder(rows.test, "test")
    adapters = [load_deltas(m.folder, m.facts) for m in members]
    coefficients, mixture, learned = _mix(
        recipe, members, adapters, base, encoder.batches(train), progress
    )
    written = write_mixture(
        folder,
        mixture,
        base,
        rank=recipe.output.rank,
        dtype=recipe.output.dtype,
        progress=progress,
    )
    test_batches = encoder.batches(test)
    too_long = sum(len(row.output) > recipe.max_new_tokens for row in test)
    if too_long and "exact_match" in recipe.evaluate:
        encoder.note(
            f"{too_long} of {len(test)} references are longer than max_new_tokens "
            f"({recipe.max_new_tokens}) and count as missed"
        )
    change = check_applied(base, folder, test_batches or encoder.batches(train or check_text(base)))
    proof = None
    if test:
        held_out = TestSet(
            test, test_batches, recipe.evaluate, recipe.max_new_tokens, recipe.data.eos
        )
        names = [m.name for m in members]
        proof = prove(base, names, adapters, mixture, folder, held_out, progress=progress)
        for row in proof.table:
            if math.isfinite(row.nll):
                continue
            if row.kind == "mixture":
                raise NotApplied("the written mixture's loss is not a number on the test rows")
            encoder.note(f"{row.name} has no finite loss on the test rows")
    shared = overlap(rows.train, rows.test)
    if shared:
        encoder.note(f"{shared} of {len(rows.test)} test rows are also training rows")
    return Composition(
        dict(zip((m.name for m in members), coefficients, strict=True)),
        written,
        change,
        encoder.facts(),
        learned,
        proof,
        shared,
        encoder.notes,
    )


def _check_modules(members: Sequence[Member], base: LoadedBase) -> None:
    """Whether the base has every module that a member changes."""
    linear = base.linear_modules()
    for member in members:
        for module in member.facts.modules:
            if module.name not in linear:
                raise IncompatibleAdapters(
                    f"{member.name} does not fit {base.name}: the base has no linear module "
                    f"{module.name}",
                    hint="the adapter was made for another base",
                )


def _mix(
    recipe: Recipe,
    members: Sequence[Member],
    adapters: Sequence[Deltas],
    base: LoadedBase,
    train: Sequence[Batch],
    progress: Progress,
) -> tuple[tuple[float, ...], Deltas, Learned | None]:
    method = recipe.method
    if not isinstance(method, Learn | LoraHub):
        given = tuple(float(m.coefficient or 0.0) for m in members)
        return given, weighted_sum(adapters, given), None
    form: Form
    if method.form == "factor":
        form = FactorForm([(m.folder, m.facts) for m in members], base.device)
    else:
        form = DeltaForm(adapters, base.device)
    learned = learn(
        base.model, form, train, size=len(members), method=method, seed=recipe.seed,
        progress=progress,
    )  # fmt: skip
    chosen = learned.coefficients
    exact = form.at(chosen) if method.form == "factor" else weighted_sum(adapters, chosen)
    return chosen, exact, learned


class _Encoder:
    """Rows to tokens by the recipe's rule; keeps account of what it did."""

    def __init__(self, recipe: Recipe, base: LoadedBase, progress: Progress) -> None:
        self._data, self._base, self._progress = recipe.data, base, progress
        self._rule = TokenRule(recipe.data.max_length, recipe.data.eos, recipe.data.chat)
        self._facts: dict[str, Any] = {}
        self.notes: list[str] = []

    def __call__(self, rows: Sequence[Row], split: str) -> list[Encoded]:
        if self._data.chat:
            pairs = [(row.input, row.output) for row in rows]
        else:
            pairs = [(render(self._data.template, row), row.output) for row in rows]
        encoded = encode(self._base.tokenizer, pairs, self._rule, seq2seq=self._base.seq2seq)
        self._check_length(encoded, split)
        if rows:
            cut = sum(row.cut > 0 for row in encoded)
            self._facts[split] = {
                "rows": len(encoded),
                "output_tokens": sum(len(row.output) for row in encoded),
                "prompts_cut": cut,
            }
            if cut:
                self.note(f"{cut} of {len(rows)} {split} prompts lost their beginning (max_length)")
        return encoded

    def _check_length(self, rows: Sequence[Encoded], split: str) -> None:
        most = getattr(self._base.model.config, "max_position_embeddings", None)
        for number, row in enumerate(rows, 1):
            parts = len(row.prompt), len(row.output)
            length = max(parts) if self._base.seq2seq else sum(parts)
            if most is not None and length > most:
                raise DataError(
                    f"{split} row {number} has {length} tokens, and {self._base.name} takes {most}",
                    hint=f"say max_length: {most} under data, which cuts prompts on their left",
                )

    def batches(self, rows: Sequence[Encoded]) -> list[Batch]:
        pad = self._base.tokenizer.pad_token_id or 0
        return batches(
            rows,
            pad=pad,
            seq2seq=self._base.seq2seq,
            device=self._base.device,
            vocabulary=len(self._base.tokenizer),
        )

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._progress.warn(text)

    def facts(self) -> dict[str, Any]:
        return {
            "template": self._data.template,
            "max_length": self._data.max_length,
            "eos": self._data.eos,
            **self._facts,
        }


def results(
    recipe: Recipe, members: Sequence[Member], base: LoadedBase, made: Composition
) -> dict[str, Any]:
    """Everything that ``results.json`` says; no paths, no dates, no names of machines."""
    found: dict[str, Any] = {
        "name": recipe.name,
        "base": {"name": base.name, "revision": base.revision},
        "method": recipe.method.model_dump(mode="json"),
        "form": getattr(recipe.method, "form", "delta"),
        "seed": recipe.seed,
        "seq2seq": base.seq2seq,
        "auto_class": "AutoModelForSeq2SeqLM" if base.seq2seq else "AutoModelForCausalLM",
        "members": [
            {
                "name": m.name,
                "ref": m.ref,
                "digest": m.digest,
                "coefficient": made.coefficients[m.name],
            }
            for m in members
        ],
        "tokens": made.tokens,
        "output": {
            "rank": recipe.output.rank.written(),
            "ranks": made.written.ranks,
            "dtype": recipe.output.dtype,
            "energy_kept": made.written.total_kept,
            "energy_kept_least": made.written.kept,
            "cast_error": made.written.cast_error,
            "largest_change_nats": made.change,
        },
        "notes": made.notes,
        "versions": {
            "lorareg": __version__,
            **{p: version(p) for p in ("torch", "transformers", "peft", "nevergrad")},
        },
        "device": str(base.device.type),
        "dtype": str(base.model.dtype).removeprefix("torch."),
    }
    if made.learned:
        found["search"] = [asdict(e) for e in made.learned.evaluations]
    if made.proof:
        found["output"]["nll_before_writing"] = made.proof.exact_nll
        found["test"] = [asdict(m) for m in made.proof.table]
        found["verdict"] = asdict(made.proof.verdict)
        found["overlap"] = made.overlap
        if "exact_match" in recipe.evaluate:
            found["exact_match"] = NORMALISATION
    return found
