"""Run the command line from a checkout: ``python cli.py search --base mistral-7b``."""

from lorahub_registry.cli import cli

if __name__ == "__main__":
    cli()
