"""The demo, as a newcomer runs it, and the examples that stand on what it makes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("demo")


def _lorareg(*args, cwd, home):
    env = os.environ | {"LORAREG_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lorahub_registry", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a clone where the quickstart has run, and what it printed."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "examples", clone / "examples")
    done = _lorareg("quickstart", "--json", cwd=clone, home=clone / "elsewhere")
    assert done.returncode == 0, done.stderr
    return clone, done


def test_the_demo_mixes_two_skills_that_no_adapter_has_together(demo):
    results = json.loads(demo[1].stdout)
    assert results["verdict"]["win"]
    table = {row["name"]: row for row in results["test"]}
    assert table["mixture"]["exact_match"] > 0.9
    assert max(row["exact_match"] for name, row in table.items() if name != "mixture") < 0.1
    chosen = {m["name"] for m in results["members"] if m["coefficient"] > 0.5}
    assert chosen == {"es-animals", "fr-does"}


def test_the_demo_says_what_it_does_in_plain_words(demo):
    told = demo[1].stderr
    assert "A tiny base" in told
    assert "Six adapters" in told
    assert f"lorareg train {demo[0] / 'quickstart' / 'factory.yaml'}\n" in told
    assert told.count("100% right at its own skill (base 0%)") == 6
    assert "none of them was trained for" in told


def test_the_adapters_are_what_the_factory_makes_of_its_file(demo):
    shelf = demo[0] / "quickstart" / "adapters"
    made = json.loads((shelf / "lorareg.json").read_text("utf-8"))
    assert made["adapters"] == sorted(p.name for p in shelf.iterdir() if p.is_dir())
    assert (len(made["adapters"]), made["together"], made["failed"]) == (6, 6, {})
    checked = _lorareg(
        "train", "quickstart/factory.yaml", "--dry-run", "--force", cwd=demo[0],
        home=demo[0] / "quickstart" / "home",
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr


def test_its_search_finds_the_adapters_that_translate(demo):
    found = _lorareg(
        "search", "--base", "quickstart-base", "--skill", "translation", "--json", cwd=demo[0],
        home=demo[0] / "quickstart" / "home",
    )  # fmt: skip
    names = {row["name"] for row in json.loads(found.stdout)}
    assert names == {"es-animals", "es-places", "fr-does", "fr-where", "fr-who"}


def test_the_demo_leaves_the_user_s_own_registry_alone(demo):
    assert not (demo[0] / "elsewhere").exists()
    assert (demo[0] / "quickstart" / "home" / "registry.sqlite").is_file()


def test_a_second_demo_does_not_overwrite_the_first_unasked(demo):
    again = _lorareg("quickstart", cwd=demo[0], home=demo[0] / "elsewhere")
    assert again.returncode == 1
    assert "--force replaces an earlier quickstart" in again.stderr


def test_force_takes_away_what_a_stopped_demo_left_and_nothing_else(tmp_path):
    folder = tmp_path / "quickstart"
    (folder / ".adapters.unfinished").mkdir(parents=True)
    (folder / "notes.txt").touch()
    done = _lorareg("quickstart", "--force", cwd=tmp_path, home=tmp_path / "home")
    assert done.returncode == 1
    assert "holds notes.txt, which no quickstart makes: left alone" in done.stderr
    assert (folder / ".adapters.unfinished").is_dir()


@pytest.mark.parametrize("name", ["linear", "ties", "learn", "learn-gradient", "lorahub"])
def test_the_examples_run_on_what_the_demo_made(demo, name):
    clone, _ = demo
    done = _lorareg("compose", f"examples/{name}.yaml", "--json", cwd=clone, home=clone / "home")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert (clone / "out" / name / "adapter_model.safetensors").is_file()
    assert "verdict" in results


def test_an_honest_no_on_a_task_that_one_adapter_was_trained_for(demo):
    clone, _ = demo
    from lorahub_registry.train.codeswitch import split, task_rows

    rows = task_rows(["fr-does"], split(0).test[:60])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (clone / "one-skill.jsonl").write_text(lines, encoding="utf-8")
    recipe = (clone / "examples" / "linear.yaml").read_text("utf-8")
    recipe = recipe.replace("../quickstart/tasks/es-animals-fr-does/test.jsonl", "one-skill.jsonl")
    recipe = recipe.replace("path: ../out/linear", "path: out/one-skill")
    (clone / "one-skill.yaml").write_text(recipe.replace("../quickstart", "quickstart"))
    done = _lorareg("compose", "one-skill.yaml", cwd=clone, home=clone / "home")
    assert done.returncode == 0, done.stderr
    assert "no better than fr-does: use fr-does" in done.stdout
