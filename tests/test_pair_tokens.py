"""Pairs of text as pairs of tokens, against TRL's own preparation of the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from lora_advisor.probes.errors import DataError
from lora_advisor.probes.pair_tokens import tokenize_pairs
from lora_advisor.probes.pairs import Pairs, read_pairs

TALK: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "chosen": [{"role": "assistant", "content": "It is 4."}],
        "rejected": [{"role": "assistant", "content": "It is five."}],
    },
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "2+3?"},
        ],
        "chosen": [{"role": "assistant", "content": "5"}],
        "rejected": [{"role": "assistant", "content": "6, or so I have heard"}],
    },
]
TEXT = [{"prompt": "2+2? ", "chosen": "It is 4.", "rejected": "It is five."}]


def tokenizer_in(folder: Path, *, chat: bool) -> Any:
    from transformers import AutoTokenizer

    tiny_model.save_tokenizer(folder, chat=chat)
    return AutoTokenizer.from_pretrained(folder)


def pairs_in(folder: Path, rows: list[dict[str, Any]]) -> Pairs:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return read_pairs(file)


def trl_rows(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return what TRL makes of rows, without a model."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    args = DPOConfig(max_length=None, bf16=False, use_cpu=True, activation_checkpointing=False)
    prepare: Any = trainer._prepare_dataset
    made = prepare(Dataset.from_list(rows), tokenizer, args, "train")
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: row[name] for name in names} for row in made]


@pytest.mark.parametrize(("rows", "chat"), [(TALK, True), (TEXT, False)], ids=["talk", "text"])
def test_pairs_are_tokenised_as_trl_does_but_end_with_the_end_of_sequence(
    tmp_path: Path, rows: list[dict[str, Any]], chat: bool
) -> None:
    tokenizer = tokenizer_in(tmp_path, chat=chat)
    ours = tokenize_pairs(pairs_in(tmp_path, rows), tokenizer, 200)
    theirs = trl_rows(rows, tokenizer)
    newline = tokenizer("\n")["input_ids"]
    for row in theirs:
        for name in ("chosen_ids", "rejected_ids"):
            if chat:  # the template writes a line's end behind it, which nobody needs to learn
                assert row[name][-len(newline) :] == newline
                row[name] = row[name][: -len(newline)]
    assert list(ours.rows) == theirs
    assert (ours.truncated, ours.dropped) == (0, 0)
    for row in ours.rows:
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id


def test_texts_without_roles_are_parted_where_the_prompt_ends(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, chat=False)
    rows = [
        {"chosen": "Human: 2+2?\nAssistant: It is 4.", "rejected": "Human: 2+2?\nAssistant: No."}
    ]
    (row,) = tokenize_pairs(pairs_in(tmp_path, rows), tokenizer, 200).rows
    assert tokenizer.decode(row["prompt_ids"]) == "Human: 2+2?\nAssistant:"
    assert tokenizer.decode(row["chosen_ids"]) == " It is 4.<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == " No.<|im_end|>"


def test_answers_that_begin_alike_are_whole_answers(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, chat=True)
    (row,) = tokenize_pairs(pairs_in(tmp_path, TALK[:1]), tokenizer, 200).rows
    assert str(tokenizer.decode(row["prompt_ids"])).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row["chosen_ids"]) == "It is 4.<|im_end|>"


def test_long_pairs_are_cut_and_counted_and_long_prompts_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, chat=True)
    pairs = pairs_in(tmp_path, TALK)
    whole = tokenize_pairs(pairs, tokenizer, 1000)
    short, long = (len(row["prompt_ids"]) for row in whole.rows)
    assert short + 7 < long
    cut = tokenize_pairs(pairs, tokenizer, short + 7)
    assert (cut.truncated, cut.dropped, len(cut.rows)) == (1, 1, 1)
    assert cut.rows[0]["chosen_ids"] == whole.rows[0]["chosen_ids"][:7]
    assert cut.lengths == whole.lengths
    assert whole.lengths[0] == short + len(whole.rows[0]["rejected_ids"])
    with pytest.raises(DataError, match="must have prompts below 4 tokens, to leave room"):
        tokenize_pairs(pairs, tokenizer, 4)
    # Both answers begin with "It is": cut there, nothing tells them apart.
    with pytest.raises(DataError, match="leave room for answers that differ"):
        tokenize_pairs(pairs, tokenizer, short + 5)


def test_equal_answers_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, chat=True)
    same = {**TALK[0], "rejected": [{"role": "assistant", "content": "It is 4.  "}]}
    same["chosen"] = same["rejected"]
    with pytest.raises(DataError, match="row 1"):
        tokenize_pairs(pairs_in(tmp_path, [same]), tokenizer, 200)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_learns_to_prefer_what_was_chosen(tmp_path: Path) -> None:
    import torch
    from recorded import configure
    from transformers import PrinterCallback

    from lora_advisor.probes.architectures import resolve_architecture
    from lora_advisor.probes.finetune import Schedule, build_trainer
    from lora_advisor.probes.tokens import load_tokenizer
    from lora_advisor.probes.weights import load_model

    tiny_model.save_model(tmp_path / "model")
    architecture = resolve_architecture(str(tmp_path / "model"))
    tokenizer = load_tokenizer(architecture)
    rows = [
        {"prompt": f"What is {n} and {n}?", "chosen": f"It is {n + n}.", "rejected": "No idea!"}
        for n in range(24)
    ]
    made = tokenize_pairs(pairs_in(tmp_path, rows), tokenizer, 64).rows
    config = configure(
        model=str(tmp_path / "model"), stage="dpo", method="lora", precision="fp32", micro_batch=4,
        accumulation=1, seq_len=64,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = build_trainer(
        config,
        load_model(config, architecture, "cpu"),
        rows=made[:20],
        tokenizer=tokenizer,
        schedule=Schedule(
            max_steps=25, learning_rate=3e-3, eval_rows=made[20:], output_dir=str(tmp_path / "out")
        ),
        device="cpu",
    )
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.693, abs=1e-3)  # ln 2: nothing is preferred yet
    assert after["eval_loss"] < 0.5
    assert after["eval_rewards/accuracies"] == 1.0
