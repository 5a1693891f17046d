"""What --force may replace: what lorareg wrote, folders of many adapters too, and nothing else."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from lorahub_registry.api.output import check_output, new_folder, write_report
from lorahub_registry.errors import OutputError
from tests import tiny, trained


@pytest.fixture
def out(tiny_llama: tiny.Tiny, tmp_path: Path) -> Path:
    """What training writes: adapters, and one report of all of them."""
    made = tmp_path / "adapters"
    with new_folder(made, force=False) as folder:
        for name in ("zog", "arr"):
            trained.adapter(tiny_llama, folder / name, name=name)
        (folder / "zog" / "adapter_model.safetensors").chmod(0o600)
        write_report(folder, {"command": "train"})
    return made


def foreign(out: Path, name: str) -> None:
    with pytest.raises(OutputError) as caught:
        check_output(out, force=True)
    assert f"holds {name}, which lorareg has not written" in str(caught.value)


def test_a_folder_of_adapters_may_be_replaced(out: Path) -> None:
    check_output(out, force=True)
    with pytest.raises(OutputError, match="not empty"):
        check_output(out, force=False)
    with new_folder(out, force=True) as folder:
        (folder / "one").write_text("1")
    assert [p.name for p in out.iterdir()] == ["one"]


def test_whoever_reads_it_may_read_all_of_it(out: Path) -> None:
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (out, *out.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o644}


@pytest.mark.parametrize("name", ["thesis.tex", "zog/thesis.tex", "zog/deep/thesis.tex", "notes/x"])
def test_a_file_of_the_user_s_is_never_deleted(name: str, out: Path) -> None:
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    foreign(out, name)


def test_an_empty_folder_and_a_link_are_the_user_s_too(out: Path, tmp_path: Path) -> None:
    (out / "later").mkdir()
    foreign(out, "later")
    (out / "later").rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x").write_text("mine")
    (out / "zog" / "link").symlink_to(elsewhere)
    foreign(out, "zog/link")


def test_adapters_without_their_report_are_not_known(out: Path) -> None:
    (out / "lorareg.json").unlink()
    foreign(out, "arr/README.md")


def test_one_trained_adapter_may_be_replaced(out: Path) -> None:
    check_output(out / "zog", force=True)
    (out / "zog" / "thesis.tex").write_text("mine")
    foreign(out / "zog", "thesis.tex")
