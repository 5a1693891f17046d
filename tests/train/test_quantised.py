"""Adapters trained on a base of 4 and of 8 bits, against PEFT on the same base."""

import pytest
import torch

pytest.importorskip("bitsandbytes")

from peft import PeftModel

from lorahub_registry.evaluate.base import load_base
from lorahub_registry.evaluate.nll import keeps_logits, label_logits
from lorahub_registry.evaluate.tokens import one_batch
from lorahub_registry.runtime.grouped import Grouped, Share
from lorahub_registry.train.run import train
from lorahub_registry.train.write import write_adapter
from tests.train.making import learner, rows

KINDS = [
    ("4bit", {}),
    ("4bit", {"use_dora": True}),
    ("8bit", {}),
    ("8bit", {"use_rslora": True, "target_modules": ("q_proj", "v_proj")}),
]


def _base(tiny, bits):
    return load_base(tiny.folder, name=tiny.name, device="cpu", quantization=bits)


@pytest.mark.parametrize(("bits", "lora"), KINDS)
def test_it_learns_and_peft_gives_the_same_on_the_quantised_base(bits, lora, tiny_llama, tmp_path):
    base = _base(tiny_llama, bits)
    kinds = {type(m).__name__ for m in base.model.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits] in kinds
    # One alone: in 8 bits the rows of a pass share what is kept in float16.
    one = learner(base.model, data=3, lora=lora, count=12, num_train_epochs=8, learning_rate=2e-2)
    train(base, [one])
    losses = [loss for _, loss in one.at.loss]
    assert one.at.state == "done"
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    batch = one_batch(rows(4, 3), range(4), 0, "cpu", seq2seq=False)
    sliced = keeps_logits(base.model)
    with torch.no_grad():
        plain = label_logits(base.model, batch, sliced=sliced)
        with Grouped(base.model, [one.parameters.factors]) as grouped:
            grouped.shares = [Share(0, 0, 4)]
            ours = label_logits(base.model, batch, sliced=sliced)
    (tmp_path / "zog").mkdir()
    write_adapter(
        tmp_path / "zog", one.parameters, base.model, base=tiny_llama.name, base_revision=None,
        task_type="CAUSAL_LM", dtype="float32",
    )  # fmt: skip
    stock = PeftModel.from_pretrained(_base(tiny_llama, bits).model, str(tmp_path / "zog")).eval()
    with torch.no_grad():
        theirs = label_logits(stock, batch, sliced=sliced)
    assert float((ours - plain).norm()) > 0.2 * float(plain.norm())
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
