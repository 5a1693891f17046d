"""Publish: push and card."""

from __future__ import annotations

from pathlib import Path

import click

from lorahub_registry.cli.output import Output, size, with_output


@click.command()
@click.argument("place", metavar="FOLDER|NAME")
@click.argument("repo", metavar="OWNER/REPO")
@click.option("--private", is_flag=True, help="Make the repo private if it is new.")
@click.option("--create-pr", is_flag=True, help="Open a pull request; do not commit.")
@click.option("--message", "-m", help="The commit's title.")
@click.option("--dry-run", is_flag=True, help="Check and list the files; send nothing.")
@with_output
def push(
    place: str, repo: str, private: bool, create_pr: bool, message: str | None, dry_run: bool,
    out: Output,
) -> None:  # fmt: skip
    """Publish a mixture or an adapter made here on the Hub, in one commit.

    Its weights, card, recipe or factory, lock and results go together or not at all. Refused: a
    local path or a token in any of them, an unknown licence, a branch that moved meanwhile.

    \b
    Examples:
      lorareg push my-mixture me/my-mixture --dry-run
      lorareg push out/my-mixture me/my-mixture --private
    """
    from lorahub_registry.api.publish import push as run

    done = run(
        place, repo, private=private, create_pr=create_pr, dry_run=dry_run, message=message,
        progress=out,
    )  # fmt: skip
    files = [{"name": name, "bytes": n, "size": size(n)} for name, n in done.files]
    if dry_run:
        out.table(files, {"name": "<", "size": ">"}, quiet="name")
        out.say(f"these would go to {repo}; nothing was sent")
        return
    where = done.pr_url or done.url
    facts = {
        "url": done.url,
        "pr_url": done.pr_url,
        "commit": done.commit,
        "changed": done.changed,
        "files": files,
    }
    out.record(facts, where, quiet=where)
    out.done(
        f"{len(files)} files in one commit" if done.changed else "the Hub has all of it already"
    )


@click.command()
@click.argument("place", metavar="FOLDER|NAME")
@click.option("--repo", metavar="OWNER/REPO", help="The Hub id that it will have.")
@with_output
def card(place: str, repo: str | None, out: Output) -> None:
    """Write an adapter's model card again, from its other files.

    \b
    Example:
      lorareg card my-mixture --repo me/my-mixture
    """
    from lorahub_registry.api.publish import card as run

    path: Path = run(place, repo=repo)
    out.record({"path": str(path)}, str(path), quiet=str(path))


COMMANDS: list[click.Command] = [push, card]
