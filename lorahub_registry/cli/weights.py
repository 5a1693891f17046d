"""Weights: compare, convert."""

from __future__ import annotations

import click

from lorahub_registry.cli.convert import convert
from lorahub_registry.cli.dare import dare
from lorahub_registry.cli.factors import extract, resize
from lorahub_registry.cli.inspect import compare
from lorahub_registry.cli.merge import merge

COMMANDS: list[click.Command] = [compare, convert, extract, resize, dare, merge]
