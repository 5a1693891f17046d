"""What every test has: a home of its own, one thread, and models small enough to build here."""

from __future__ import annotations

import os
import signal

# Read when torch, transformers and huggingface_hub are imported, so they stand before any import.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"
os.environ.pop("HF_HUB_OFFLINE", None)

from pathlib import Path

import hypothesis
import pytest

from tests import tiny

# No test depends on time, and none leaves files in the checkout.
hypothesis.settings.register_profile("lorareg", deadline=None, database=None)
hypothesis.settings.load_profile("lorareg")

# Of a run in the background a shell has it ignored, and tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's registry nor the user's cache is read or written."""
    monkeypatch.setenv("LORAREG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("LORAREG_DEBUG", raising=False)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models, adapters, configs, cards and tasks."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LORAREG_TEST_DATA") or beside)
    if not (folder / "models").is_dir():
        pytest.skip(f"no test data in {folder} (LORAREG_TEST_DATA says where they are)")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """A two-layer Llama whose head is not tied; its tokenizer starts with BOS."""
    return tiny.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """A two-layer gpt2: Conv1D layers, a tied head, a tokenizer without BOS."""
    return tiny.make("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """A two-layer T5, whose tokenizer ends with EOS."""
    return tiny.make("t5", tmp_path_factory.mktemp("t5"))
