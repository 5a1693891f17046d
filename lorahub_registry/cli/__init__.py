"""The command line: click, one file a group; output and errors in one place."""

from lorahub_registry.cli.main import cli

__all__ = ["cli"]
