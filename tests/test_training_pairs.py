"""Preference pairs trained to the end: hold-out, guards, checkpoints, lack of memory, bad pairs."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from tiny_training import config_of, run, weights

from lora_advisor.advisor.guards import SPIKE_NATS, DivergedError, find_divergence
from lora_advisor.advisor.lengths import epoch_of
from lora_advisor.advisor.outcome import Predicted
from lora_advisor.advisor.preference_loss import PairRewards, compare_pairs
from lora_advisor.advisor.report_training import training_text
from lora_advisor.advisor.run_folder import last_complete_checkpoint
from lora_advisor.advisor.stopping import Interrupted
from lora_advisor.advisor.training import Progress, TrainingResult
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import DataError, UsageError
from lora_advisor.probes.pair_tokens import PairRow, tokenize_pairs
from lora_advisor.probes.pairs import read_pairs
from lora_advisor.probes.preference import pair_length
from lora_advisor.probes.tokens import load_tokenizer, split_holdout

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STILL = LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that two runs can be compared bit by bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _reported_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_advisor.advisor.watch.REPORT_S", 0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_model(folder)
    tiny_model.save_pairs(folder / "pairs.jsonl")
    return folder


def pairs_of(tiny: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {"stage": "dpo", "trainer": "trl", "loss": "fused", "lora": STILL}
    return config_of(tiny, **{**values, **changes})


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    folder = tmp_path_factory.mktemp("unbroken")
    promised = Predicted(padded_tokens_per_s=1000.0, seconds_per_token=1e-3, start_seconds=7.0)
    return run(pairs_of(tiny), tiny / "pairs.jsonl", folder, predicted=promised)


def rows_of(tiny: Path, *, holdout: float = 0.1) -> tuple[list[PairRow], list[PairRow]]:
    tokenizer = load_tokenizer(resolve_architecture(str(tiny)))
    rows = tokenize_pairs(read_pairs(tiny / "pairs.jsonl"), tokenizer, 96).rows
    return split_holdout(rows, holdout, seed=0)


def save_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choice("0123456789") for _ in range(count))


# What comes of it --------------------------------------------------------------------------------


def test_pairs_are_learnt_and_told_apart_by_reward(tiny: Path, unbroken: TrainingResult) -> None:
    result, found = unbroken, unbroken.preference
    assert (result.rows, result.holdout_rows, result.steps) == (36, 4, 12)
    assert (result.shape, result.likelihood, result.known) == ("preference", None, None)
    # The adapter starts at zero, where both models agree.
    assert result.eval_loss_before == pytest.approx(math.log(2), abs=1e-6)
    assert result.losses[0][0] == 1
    assert result.losses[0][1] == pytest.approx(math.log(2), abs=1e-6)
    assert result.eval_loss_after is not None and result.eval_loss_after < 0.5
    assert found is not None
    assert (found.pairs, found.base_loss) == (4, result.eval_loss_before)
    assert found.tuned_loss == result.eval_loss_after
    assert (found.base_accuracy, found.tuned_accuracy) == (0.0, 1.0)
    assert found.chosen_reward > found.rejected_reward
    assert found.low is not None and found.high is not None
    assert 0 < found.low < found.drop < found.high
    written = json.loads((result.adapter.parent / "result.json").read_text())
    assert TrainingResult.from_json(written) == result


def test_people_read_the_dpo_loss_the_rewards_and_the_time(unbroken: TrainingResult) -> None:
    text = training_text(unbroken)
    assert "12 steps, 36 pairs, 4 held out" in text
    assert f"held-out DPO loss 0.693 before, {unbroken.eval_loss_after:.3f} after\n" in text
    assert "reward accuracy, pairs with chosen above rejected: 0% before" in text
    assert "nats" not in text and "clear" not in text
    card = (unbroken.adapter / "README.md").read_text("utf-8")
    assert "hold-out before (DPO loss)" in card and "| 0.6931 " in card
    assert "2 pairs x 96 x 2" in card
    samples = json.loads((unbroken.adapter.parent / "samples.json").read_text())["samples"]
    assert len(samples) == 3
    assert all(sample["reference"].startswith("It is") for sample in samples)
    assert samples[0]["tuned"] != samples[0]["base"]


def test_the_time_of_the_steps_is_that_of_the_tokens_to_come(
    tiny: Path, unbroken: TrainingResult
) -> None:
    train, _ = rows_of(tiny)
    epoch = epoch_of(
        [pair_length(row) for row in train],
        "random",
        seq_len=96,
        micro_batch=2,
        accumulation=2,
        sequences=2,
        multiple=2,  # 96 tokens have 48 parts
    )
    assert (epoch.optimizer_steps, unbroken.steps) == (9, 12)
    promised, came = unbroken.predicted, unbroken.measured.train_seconds
    assert promised is not None and promised.train_seconds is not None
    assert promised.train_seconds == pytest.approx(7.0 + 1e-3 * epoch.computed_tokens / 9 * 12)
    row = next(at for at in training_text(unbroken).splitlines() if at.startswith("time of"))
    assert row.split()[-1] == f"{came / promised.train_seconds - 1:+.1%}"


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16", "checkpointing": "full", "method": "qlora"}],
    ids=["fp32", "qlora-bf16-checkpointing"],
)
def test_the_rewards_of_the_held_out_pairs_are_those_of_the_two_models(
    tmp_path: Path, tiny: Path, changes: dict[str, Any]
) -> None:
    import torch
    from transformers import set_seed

    from lora_advisor.advisor.evaluation import evaluate
    from lora_advisor.probes.finetune import Schedule, build_trainer
    from lora_advisor.probes.weights import load_model

    config, (_, held) = pairs_of(tiny, **changes), rows_of(tiny, holdout=0.25)
    architecture = resolve_architecture(config.model)
    set_seed(0)
    trainer: Any = build_trainer(
        config,
        load_model(config, architecture, "cpu"),
        rows=held,
        tokenizer=load_tokenizer(architecture),
        schedule=Schedule(max_steps=1, output_dir=str(tmp_path), eval_rows=held, eval_batch=3),
        device="cpu",
    )
    with torch.no_grad():  # an adapter that says something
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    seen = evaluate(trainer)
    assert isinstance(seen.rows, PairRewards) and seen.rows.beta == 0.1

    def likelihood(row: PairRow, side: str) -> float:  # written out: no trainer and no padding
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        with torch.no_grad(), trainer.compute_loss_context_manager():
            beliefs = trainer.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        start = len(row["prompt_ids"])
        return float(beliefs.gather(1, ids[0, 1:, None])[start - 1 :].sum())

    trainer.model.eval()
    near = 2e-4 if config.precision == "fp32" else 0.02
    for row, chosen, rejected in zip(held, seen.rows.chosen, seen.rows.rejected, strict=True):
        tuned = [likelihood(row, side) for side in ("chosen_ids", "rejected_ids")]
        with trainer.model.disable_adapter():
            base = [likelihood(row, side) for side in ("chosen_ids", "rejected_ids")]
        assert chosen == pytest.approx(0.1 * (tuned[0] - base[0]), abs=near)
        assert rejected == pytest.approx(0.1 * (tuned[1] - base[1]), abs=near)
    # TRL reports the mean over its batches, here of 3, 3, 3 and 1 pairs.
    theirs = trainer.state.log_history[-1]["eval_rewards/margins"]
    order = sorted(range(10), key=lambda at: -pair_length(held[at]))
    margins = [seen.rows.chosen[at] - seen.rows.rejected[at] for at in order]
    batches = [margins[at : at + 3] for at in range(0, 10, 3)]
    means = [sum(batch) / len(batch) for batch in batches]
    assert theirs == pytest.approx(sum(means) / 4, abs=1e-4)


def test_the_interval_and_the_accuracy_of_pairs() -> None:
    base = PairRewards(chosen=(0.0,) * 4, rejected=(0.0,) * 4, beta=0.1)
    tuned = PairRewards(chosen=(1.0, 1.0, -1.0, 0.5), rejected=(0.0, -1.0, 0.0, 0.5), beta=0.1)
    found = compare_pairs(base, tuned)
    losses = [math.log1p(math.exp(-margin)) for margin in (1.0, 2.0, -1.0, 0.0)]
    assert found.tuned_loss == pytest.approx(sum(losses) / 4)
    assert found.drop == pytest.approx(math.log(2) - sum(losses) / 4)
    assert (found.base_accuracy, found.tuned_accuracy) == (0.0, 0.5)  # an equal reward is none
    assert found.low is not None and found.low < found.drop
    wild = PairRewards(chosen=(-900.0,), rejected=(900.0,), beta=0.1)
    assert wild.loss == pytest.approx(1800.0)
    assert compare_pairs(wild, wild).low is None  # one pair gives no interval


# The step and its micro-batches ------------------------------------------------------------------


def test_a_pass_over_pairs_is_counted_as_the_loader_yields_it(tmp_path: Path, tiny: Path) -> None:
    from lora_advisor.probes.finetune import Schedule, build_trainer
    from lora_advisor.probes.pair_tokens import pair_tokens
    from lora_advisor.probes.weights import load_model

    config, (rows, _) = pairs_of(tiny, micro_batch=5), rows_of(tiny)
    architecture = resolve_architecture(config.model)
    trainer = build_trainer(
        config,
        load_model(config, architecture, "cpu"),
        rows=rows,
        tokenizer=load_tokenizer(architecture),
        schedule=Schedule(seed=3, shuffle=True, output_dir=str(tmp_path)),
        device="cpu",
    )
    batches = list(trainer.get_train_dataloader())
    epoch = epoch_of(
        [pair_length(row) for row in rows],
        "random",
        seq_len=96,
        micro_batch=5,
        seed=3,
        sequences=2,
        useful_tokens=sum(pair_tokens(row) for row in rows),
        multiple=2,
    )
    tokens = Counter(batch["input_ids"].numel() for batch in batches)
    assert epoch.histogram == tuple(sorted(tokens.items()))
    assert epoch.useful_tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    whole = [tokens for tokens in epoch.lengths if tokens == int(tokens)]
    longest = max(pair_length(row) for row in rows)
    assert max(whole) == longest + longest % 2  # tokens of one sequence


class Device:
    """Stands for a device that is too small for some batches: raises as PyTorch does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch
        from transformers.models.llama import modeling_llama

        self.most = 1000
        self.batches: list[tuple[tuple[int, int], bool]] = []
        plain = modeling_llama.LlamaModel.forward

        def forward(model: Any, input_ids: Any = None, **kwargs: Any) -> Any:
            self.batches.append((tuple(input_ids.shape), model.training))
            if model.training and len(input_ids) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return plain(model, input_ids=input_ids, **kwargs)

        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)


def test_the_longest_pairs_come_first_and_memory_that_runs_out_costs_no_pair(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch)

    def told(progress: Progress) -> None:
        if progress.step == 6:
            device.most = 2  # the two sequences of one pair

    result = run(pairs_of(tiny), tiny / "pairs.jsonl", tmp_path, progress=told)
    trained = [shape for shape, training in device.batches if training]
    train, _ = rows_of(tiny)
    longest = max(pair_length(row) for row in train)
    assert trained[0] == (4, longest + longest % 2)
    assert trained[-2:] == [(2, trained[-1][1])] * 2  # as it is, and as its own reference
    (recovery,) = result.recoveries
    assert (recovery.after_step, recovery.micro_batch, recovery.new_micro_batch) == (4, 2, 1)
    assert result.steps == 12
    assert result.eval_loss_after == pytest.approx(unbroken.eval_loss_after, rel=1e-3)


def test_what_is_looked_at_before_the_first_step_leaves_no_trace(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult
) -> None:
    from transformers import set_seed

    from lora_advisor.advisor.schedule import Settings
    from lora_advisor.probes.finetune import build_trainer
    from lora_advisor.probes.weights import load_model

    # The same steps with nothing around them: no evaluation, no guard, no pairs tried first.
    config, (train, held) = pairs_of(tiny), rows_of(tiny)
    architecture = resolve_architecture(config.model)
    settings = Settings(
        epochs=1.0, max_steps=12, learning_rate=5e-3, holdout=0.1, seed=0, save_steps=100,
        eval_batch=None,
    )  # fmt: skip
    set_seed(0)
    trainer = build_trainer(
        config,
        load_model(config, architecture, "cpu"),
        rows=train,
        tokenizer=load_tokenizer(architecture),
        schedule=settings.schedule(config, rows=len(train), held=held, output=tmp_path),
        device="cpu",
    )
    set_seed(0)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert weights(tmp_path / "adapter") == weights(unbroken.adapter)


# Going on ----------------------------------------------------------------------------------------

#: A process that trains, and is killed (SIGKILL) while it writes the optimizer of checkpoint 8.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_training_pairs, tiny_training, torch
model, output, save = Path(sys.argv[2]), Path(sys.argv[3]), torch.save

def torn(content, file, *args, **kwargs):
    save(content, file, *args, **kwargs)
    if str(file).endswith("checkpoint-8/optimizer.pt"):
        with open(file, "r+b") as stream:
            stream.truncate(Path(file).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = torn
torch.set_num_threads(1)
tiny_training.run(test_training_pairs.pairs_of(model), model / "pairs.jsonl", output)
"""


def test_a_killed_training_of_pairs_goes_on_to_the_same_weights(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tiny), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert ended.returncode == -9, ended.stderr[-2000:]
    result = run(pairs_of(tiny), tiny / "pairs.jsonl", tmp_path)
    assert result.resumed_from_step == 4
    assert weights(result.adapter) == weights(unbroken.adapter)
    assert result.preference == unbroken.preference
    assert result.evaluations == unbroken.evaluations


def test_a_signal_ends_a_training_of_pairs_with_a_checkpoint_that_goes_on_exactly(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult
) -> None:
    def told(progress: Progress) -> None:
        if progress.step == 10:  # behind an evaluation
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"the checkpoint of step 11 holds") as stopped:
        run(pairs_of(tiny), tiny / "pairs.jsonl", tmp_path, progress=told)
    assert stopped.value.exit_code == 143
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-11"
    result = run(pairs_of(tiny), tiny / "pairs.jsonl", tmp_path)
    assert weights(result.adapter) == weights(unbroken.adapter)
    assert result.preference == unbroken.preference


# Guards ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model that is at home in the chosen answers, and the pairs."""
    folder, draw = tmp_path_factory.mktemp("learnt"), random.Random(1)
    rows = [{"prompt": f"Number {n}?", "completion": digits(draw, 40)} for n in range(8)]
    config = config_of(tiny, method="full", lora=None, micro_batch=8, accumulation=1)
    settings: dict[str, Any] = {"max_steps": 100, "learning_rate": 3e-3, "holdout": 0.0}
    settings.update(save_steps=1000, check_rows=0)
    data = save_rows(folder / "rows.jsonl", list(rows))
    base = run(config, data, folder / "out", **settings).adapter
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": digits(draw, 40)}
        for row in rows
    ]
    return base, save_rows(folder / "pairs.jsonl", pairs)


@pytest.mark.parametrize(("learning_rate", "kept"), [(0.3, True), (3.0, False)])
def test_a_dpo_loss_that_leaps_stops_the_training(
    tmp_path: Path, learnt: tuple[Path, Path], learning_rate: float, kept: bool
) -> None:
    # The learning rate rises until it bursts what the model knows of the chosen answers.
    model, data = learnt
    config = pairs_of(model, micro_batch=4, accumulation=1)
    wild: dict[str, Any] = {"learning_rate": learning_rate, "warmup_steps": 60, "max_steps": 80}
    wild.update(save_steps=2 if kept else 50, holdout=0.0)
    if not kept:
        with pytest.raises(DivergedError, match=r"from 0\.69 .* before there was a checkpoint"):
            run(config, data, tmp_path, **wild)
        return
    result = run(config, data, tmp_path, **wild)
    stop, losses = result.stop, dict(result.losses)
    assert stop is not None and stop.reason == "loss spike" and stop.kept_step is not None
    assert result.steps < 30 and losses[result.steps] > 2
    # What is kept is from before the climb; how steep that is depends on the machine's sums.
    assert losses[stop.kept_step + 1] < math.log(2) + SPIKE_NATS / 2
    assert weights(result.adapter) == weights(tmp_path / f"checkpoint-{stop.kept_step}")


def test_a_dpo_loss_that_is_no_number_stops_the_training(tmp_path: Path, tiny: Path) -> None:
    # In the first step the warm-up's learning rate is 0; the second step's bursts every weight.
    settings: dict[str, Any] = {"learning_rate": 1e30, "warmup_steps": 10, "save_steps": 1}
    result = run(pairs_of(tiny), tiny / "pairs.jsonl", tmp_path, **settings)
    assert result.stop is not None and result.stop.reason.startswith("non-finite")
    assert result.stop.kept_step == 1
    assert result.eval_loss_after == pytest.approx(math.log(2), abs=1e-6)
    assert result.preference is not None and result.preference.drop == pytest.approx(0, abs=1e-6)


def test_over_fitted_pairs_end_the_training_with_the_best_model(tmp_path: Path, tiny: Path) -> None:
    draw = random.Random(0)  # preferences of no meaning can only be learnt by heart
    data = save_rows(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": f"{n}?", "chosen": digits(draw, 12), "rejected": digits(draw, 12)}
            for n in range(24)
        ],
    )
    shape = LoraShape(r=16, alpha=32, dropout=0.0, targets="all-linear")
    config = pairs_of(tiny, micro_batch=8, accumulation=1, lora=shape)
    settings: dict[str, Any] = {"epochs": 60.0, "max_steps": None, "learning_rate": 1e-2}
    settings.update(save_steps=50)
    result = run(config, data, tmp_path / "a", holdout=0.25, **settings)
    stop, losses = result.stop, {held.step: held.loss for held in result.evaluations}
    assert stop is not None and stop.reason == "over-fitting"
    assert result.steps == max(losses) < 180
    assert stop.kept_step is not None and losses[stop.kept_step] == min(losses.values())
    assert result.eval_loss_after == pytest.approx(min(losses.values()), rel=1e-6)
    assert all(losses[step] > min(losses.values()) + 0.02 for step in sorted(losses)[-2:])
    assert weights(result.adapter) == weights(tmp_path / "a" / f"best-{stop.kept_step}")


def test_the_start_of_the_dpo_loss_stands_for_steps_that_are_missing() -> None:
    start = math.log(2)
    stop = find_divergence([start, start, 4.0, 4.0, 4.0], 1, scaled=False, start=start)
    assert stop is not None and (stop.step, stop.good_step) == (3, 1)
    assert "median of 2 steps and the start's 0.69" in stop.detail
    assert find_divergence([start, start, 4.0, 4.0, 4.0], 1, scaled=False) is None
    assert find_divergence([start, start, 2.0, 2.0, 2.0], 5, scaled=False, start=start) is None
    assert find_divergence([9.0, 9.0], 2, scaled=False, start=start) is None


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (
            {"prompt": "2+2?", "chosen": "4"},
            "row 3 must have `chosen` and `rejected` .* prompt, ch",
        ),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "4"}, "row 3 must have answers that differ"),
        (
            {
                "chosen": [
                    {"role": "user", "content": "2?"},
                    {"role": "assistant", "content": "4"},
                ],
                "rejected": [
                    {"role": "user", "content": "3?"},
                    {"role": "assistant", "content": "5"},
                ],
            },
            "row 3 must have one prompt for both answers",
        ),
    ],
    ids=["rejected-missing", "the-same", "two-prompts"],
)
def test_bad_pairs_are_said_in_one_sentence(
    tmp_path: Path, tiny: Path, bad: dict[str, Any], sentence: str
) -> None:
    good = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}
    data = save_rows(tmp_path / "pairs.jsonl", [good, good, bad])
    with pytest.raises(DataError, match=sentence) as refused:
        run(pairs_of(tiny), data, tmp_path / "out")
    assert refused.value.exit_code == 65
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_data_of_the_other_stage_is_refused(tmp_path: Path, tiny: Path) -> None:
    tiny_model.save_rows(tmp_path / "rows.jsonl", count=4)
    with pytest.raises(DataError, match="the shape question/answer is for stage sft"):
        run(pairs_of(tiny), tmp_path / "rows.jsonl", tmp_path / "out")
    with pytest.raises(DataError, match="pairs of a good and a bad answer are for stage dpo"):
        run(config_of(tiny), tiny / "pairs.jsonl", tmp_path / "out")


def test_what_does_not_go_with_pairs_is_refused_or_said(tmp_path: Path, tiny: Path) -> None:
    data = tiny / "pairs.jsonl"
    for option, words in (("drop_known", "--drop-known"), ("check_rows", "--check-rows")):
        with pytest.raises(UsageError, match=f"`{words}` must be left out with stage dpo"):
            run(pairs_of(tiny), data, tmp_path / "out", **{option: True})
    said: list[str] = []
    shape = LoraShape(r=4, alpha=8, dropout=0.1, targets="all-linear")
    result = run(pairs_of(tiny, lora=shape), data, tmp_path, say=said.append, max_steps=1)
    assert said[0].startswith("no pair is looked at beforehand: ")
    assert said[1].startswith("the adapter's dropout of 0.1 is not applied: ")
    assert json.loads((tmp_path / "state.json").read_text())["identity"]["learning_rate"] == 5e-3
    assert result.steps == 1


def test_pairs_have_a_learning_rate_of_their_own(tmp_path: Path, tiny: Path) -> None:
    run(pairs_of(tiny), tiny / "pairs.jsonl", tmp_path, learning_rate=None, max_steps=1, holdout=0)
    identity = json.loads((tmp_path / "state.json").read_text())["identity"]
    assert (identity["learning_rate"], identity["stage"]) == (5e-6, "dpo")
