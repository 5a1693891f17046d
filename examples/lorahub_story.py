"""LoraHub's story in small: eight adapters trained at once, mixed for a ninth task that none saw.

    python examples/lorahub_story.py --tasks FOLDER

FOLDER holds one JSONL file a task, with the columns ``input`` and ``output`` (or ``prompt`` and
``completion``), as T0's or P3's templates give them; a hundred rows each are enough. ``--unseen``
names the file that nothing is trained on, ``--upstream`` those that get an adapter each.

It is LoraHub's recipe (arXiv:2307.13269): LoRA of rank 16 and alpha 32 on q and v of a T5, one
adapter a task, then coefficients from a few examples of the unseen task, without gradients. The
base is a T5 of 0.6 million parameters that is made here, tokenizer and all, from the prompts of
all tasks but the unseen one: it learns to continue them, and never sees an answer. Two things
differ from the paper because it is so small: it needs a higher learning rate than the published
2e-4 (``--learning-rate``), and prompts are cut to their last 96 tokens. With a real T5 give its
name by ``--base``, and the paper's rate.

On the templates of T0 that are the defaults here, five examples by ``lorahub`` gave a mixture that
beats the best single adapter by 0.05 ± 0.01 NLL (0.794 to 0.845), forty by ``learn`` one that beats
it by 0.08 ± 0.02 (0.764). No adapter of so small a base understands the question: what is mixed is
which answers are likely, and none was right more often than always saying No (81.7%).

At the published rate of 2e-4 the same five epochs teach this base next to nothing (each adapter
ends at 5.4 to 6.5 NLL on its own task, from 6.6 to 7.9, and none answers anything rightly); over
forty epochs (``--learning-rate 2e-4 --epochs 40``) they get to 0.5 to 5.3, where the default rate
gets in five, and the mixtures to 1.002 and 0.962, the best single adapter being at 1.103. As it
stands it takes 100 seconds of CPU; with forty epochs about five minutes.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lorahub_registry import Registry, compose
from lorahub_registry.api.train import train

UPSTREAM = (
    "ag_news_which_section",
    "amazon_polarity_Is_this_product_review_positive",
    "common_gen_topics_from_the_sentence",
    "glue_mrpc_same_thing",
    "glue_qqp_meaning",
    "social_i_qa_Check_if_a_random_answer_is_valid_or_not",
    "wiqa_does_the_supposed_perturbation_have_an_effect",
    "yelp_review_full_based_on_that",
)
UNSEEN = "qasc_is_correct_1"
EXAMPLES, LEARN_ROWS, UNSEEN_TEST = 5, 40, 120
PIECES, CONTINUED = 2000, 12
TOKENS = {"template": "{{ input }}", "max_length": 96}
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """A task's rows, shuffled, each with ``input`` and ``output``."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        prompt = row.get("input") or row.get("prompt")
        answer = row.get("output") or row.get("completion")
        if not prompt or not answer:
            raise SystemExit(f"{path.name}: a row needs input and output, or prompt and completion")
        rows.append(
            {"input": prompt.strip(), "output": answer.replace("<|endoftext|>", "").strip()}
        )
    random.Random(0).shuffle(rows)
    return rows


def write(path: Path, rows: Rows) -> dict[str, Any]:
    """Write rows; what a recipe or factory says of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path)}


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of the tasks' own words; EOS after every text, as T5 has it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=PIECES,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_base(folder: Path, tasks: dict[str, Rows], held_out: int, steps: int) -> Path:
    """A small T5 that has learned to continue prompts, by T5's own prefix objective.

    Answers lend the tokenizer their words and are not trained on.
    """
    rows = [row for task in tasks.values() for row in task[:-held_out]]
    prompts = [row["input"] for row in rows]
    tokenizer = make_tokenizer(prompts + [row["output"] for row in rows])
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    ids = [row for row in tokenizer(prompts)["input_ids"] if len(row) > 2 * CONTINUED]
    draw = random.Random(0)
    for step in range(steps):
        heads, tails = [], []
        for row in draw.choices(ids, k=32):
            at = draw.randrange(CONTINUED, len(row) - 4)
            heads.append(torch.tensor([*row[max(0, at - 64) : at], 1]))
            tails.append(torch.tensor(row[at : at + CONTINUED]))
        pad = torch.nn.utils.rnn.pad_sequence
        given = pad(heads, batch_first=True)
        loss = model(
            input_ids=given,
            attention_mask=given != 0,
            labels=pad(tails, batch_first=True, padding_value=-100),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"base: step {step + 1} of {steps}, loss {loss.item():.2f}", flush=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_upstream(
    base: str, tasks: dict[str, Rows], out: Path, args: argparse.Namespace, registry: Registry
) -> Any:
    """An adapter for each task, in one run; the last rows of each are held out."""
    adapters = []
    for name, rows in tasks.items():
        known, held_out = rows[: -args.test_rows], rows[-args.test_rows :]
        data = {
            "train": write(out / "rows" / f"{name}.jsonl", known),
            "test": write(out / "rows" / f"{name}-test.jsonl", held_out),
        }
        adapters.append({"name": name, "data": {**data, **TOKENS}})
        adapters[-1]["lora"] = {"r": 16, "lora_alpha": 32, "target_modules": ["q", "v"]}
        adapters[-1]["training"] = {
            "learning_rate": args.learning_rate,
            "batch_size": 16,
            "num_train_epochs": args.epochs,
        }
    factory = {
        "version": 1,
        "name": "upstream",
        "base": base,
        "adapters": adapters,
        "output": {"path": str(out / "upstream")},
    }
    made = train(factory, registry=registry, force=True)
    print(f"\n{len(tasks)} adapters from one run, each on its own task (NLL of the answers):")
    for name, found in made.results.items():
        before, after = found["test"]
        print(f"  {name:<56} {before['nll']:.3f} → {after['nll']:.3f}", flush=True)
    return made


def mix(
    method: str, few: Rows, test: Rows, base: str, made: Any, out: Path, registry: Registry
) -> None:
    """Coefficients from a few rows of the unseen task; the proof, and those that count."""
    recipe = {
        "version": 1,
        "name": method,
        "base": base,
        "adapters": [str(made.path / name) for name in made.adapters],
        "method": {"type": method},
        "data": {
            "train": write(out / "rows" / f"unseen-{len(few)}.jsonl", few),
            "test": write(out / "rows" / "unseen-test.jsonl", test),
            **TOKENS,
        },
        "evaluate": ["nll", "exact_match"],
        "max_new_tokens": 6,
        "output": {"path": str(out / method)},
    }
    mixture = compose(recipe, registry=registry, force=True)
    print(f"\n{method}, {len(few)} examples of the unseen task:")
    for row in sorted(mixture.results["test"], key=lambda row: row["nll"]):
        print(f"  {row['name']:<56} NLL {row['nll']:.3f}  exact {row['exact_match']:.1%}")
    kept = {name: round(c, 2) for name, c in mixture.coefficients.items() if abs(c) >= 0.05}
    print(f"  coefficients: {kept}\n  {mixture.verdict}", flush=True)


def main(args: argparse.Namespace) -> None:
    """Make the base, train the adapters, mix them twice, show what that gave."""
    torch.set_num_threads(1)  # more only wait for each other in steps this small
    transformers.utils.logging.disable_progress_bar()
    missing = [
        n for n in (args.unseen, *args.upstream) if not (args.tasks / f"{n}.jsonl").is_file()
    ]
    if missing:
        raise SystemExit(
            f"--tasks: no file {missing[0]}.jsonl in the folder; it needs one JSONL file a task,"
            " and --unseen NAME --upstream NAME … say which of them to take"
        )
    if args.unseen in args.upstream:
        raise SystemExit(f"--unseen: {args.unseen} is one of --upstream; nothing is trained on it")
    out = args.out.resolve()
    tasks = {name: read(args.tasks / f"{name}.jsonl") for name in args.upstream}
    unseen = read(args.tasks / f"{args.unseen}.jsonl")
    base = args.base or str(make_base(out / "tiny-t5", tasks, args.test_rows, args.base_steps))
    with Registry(out / "registry.sqlite") as registry:
        made = train_upstream(base, tasks, out, args, registry)
        print(f"\nThe unseen task: {args.unseen}")
        test = unseen[LEARN_ROWS:][:UNSEEN_TEST]
        mix("lorahub", unseen[:EXAMPLES], test, base, made, out, registry)
        mix("learn", unseen[:LEARN_ROWS], test, base, made, out, registry)


def options() -> argparse.ArgumentParser:
    """What it takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=Path, required=True, help="a folder of JSONL files")
    parser.add_argument("--unseen", default=UNSEEN, help="the file that nothing is trained on")
    parser.add_argument("--upstream", nargs="+", default=UPSTREAM, help="one adapter each")
    parser.add_argument("--out", type=Path, default=Path("out/lorahub-story"))
    parser.add_argument("--base", help="a T5 to use in place of the one that is made")
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--test-rows", type=int, default=40, help="of each task, held out")
    return parser


if __name__ == "__main__":
    main(options().parse_args())
