"""``python -m lorahub_registry``."""

from lorahub_registry.cli import cli

if __name__ == "__main__":
    cli(prog_name="lorareg")
