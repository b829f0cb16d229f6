"""The guards of a training, each set off by a training that really goes wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_training import config_of, run, weights

from lora_advisor.advisor.guards import DivergedError, HeldOut, find_divergence, find_overfit
from lora_advisor.advisor.likelihood import RowLosses, compare_rows
from lora_advisor.advisor.report_training import training_text
from lora_advisor.advisor.training import TrainingResult
from lora_advisor.probes.config import LoraShape
from lora_advisor.probes.errors import DataError

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_secrets(file: Path, count: int, *, seed: int = 0) -> None:
    """Save rows that can only be learnt by heart: digits of no meaning."""
    draw = random.Random(seed)
    rows = (
        {
            "question": f"Number {n}?",
            "answer": "".join(draw.choice("0123456789") for _ in range(20)),
        }
        for n in range(count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def learnt(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model that knows the first 8 of 24 rows by heart, and the rows."""
    folder = tmp_path_factory.mktemp("learnt")
    save_secrets(folder / "all.jsonl", 24, seed=1)
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[:8]))
    config = config_of(tiny, method="full", lora=None, micro_batch=8, accumulation=1)
    settings: dict[str, Any] = {"max_steps": 150, "learning_rate": 3e-3, "holdout": 0.0}
    result = run(config, folder / "some.jsonl", folder / "out", check_rows=0, **settings)
    return result.adapter, folder / "all.jsonl"


def test_a_loss_that_leaps_stops_the_training_at_the_last_good_checkpoint(
    tmp_path: Path, learnt: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The model knows these rows; the learning rate rises until it bursts what it knows.
    monkeypatch.setattr("lora_advisor.advisor.watch.REPORT_S", 0.0)
    wild: dict[str, Any] = {"learning_rate": 0.3, "warmup_steps": 60, "max_steps": 80}
    wild.update(save_steps=2, check_rows=0, holdout=0.0)
    model, data = learnt
    said: list[str] = []
    result = run(config_of(model), data.with_name("some.jsonl"), tmp_path, say=said.append, **wild)
    stop, losses = result.stop, dict(result.losses)
    assert stop is not None and stop.reason == "loss spike" and stop.kept_step is not None
    assert result.steps < 30
    assert stop.kept_step % 2 == 0 and stop.kept_step <= stop.good_step < stop.step
    # The model that was kept still knew them; the one after which it stopped does not.
    assert losses[stop.kept_step + 1] < 1.1 and losses[result.steps] > 2
    assert weights(result.adapter) == weights(tmp_path / f"checkpoint-{stop.kept_step}")
    assert stop.advice[0] == "a lower --learning-rate, such as 0.15"
    assert json.loads((tmp_path / "stopped.json").read_text())["reason"] == "loss spike"
    assert f"going back to checkpoint {stop.kept_step}" in said[-1]
    assert training_text(result).startswith("stopped, loss spike: the training loss rose from 0.")
    written = json.loads((tmp_path / "result.json").read_text())
    assert TrainingResult.from_json(written) == result
    assert run(config_of(model), data.with_name("some.jsonl"), tmp_path, **wild) == result


@pytest.mark.parametrize("save_steps", [1, 50], ids=["with-a-checkpoint", "without"])
def test_a_loss_that_is_no_number_stops_the_training(
    tmp_path: Path, tiny: Path, save_steps: int
) -> None:
    # In the first step the warm-up's learning rate is 0; the second step's bursts every weight.
    settings: dict[str, Any] = {"learning_rate": 1e30, "warmup_steps": 10, "save_steps": save_steps}
    config = config_of(tiny, method="qlora", precision="bf16")
    if save_steps == 50:
        with pytest.raises(
            DivergedError, match=r"before there was a checkpoint .* \(--restart\) with a lower"
        ):
            run(config, tiny / "rows.jsonl", tmp_path, **settings)
        assert DivergedError.exit_code == 3
        assert not (tmp_path / "result.json").exists()
    else:
        result = run(config, tiny / "rows.jsonl", tmp_path, **settings)
        assert result.stop is not None and result.stop.kept_step == 1
        assert result.stop.advice[:2] == (
            "a lower --learning-rate, such as 5e+29",
            '4-bit type "fp4" instead of "nf4"',
        )
        # Nothing was learnt in the first step, so the model kept is the one that came.
        assert result.eval_loss_after == pytest.approx(result.eval_loss_before, rel=1e-6)
        assert result.likelihood is not None and result.likelihood.verdict == "none"
    stop = json.loads((tmp_path / "stopped.json").read_text())
    assert stop["reason"].startswith("non-finite")
    assert stop["step"] in (2, 3)


def test_over_fitting_ends_the_training_with_the_best_model(tmp_path: Path, tiny: Path) -> None:
    data = tmp_path / "secrets.jsonl"
    save_secrets(data, 24)
    config = config_of(
        tiny,
        micro_batch=4,
        accumulation=1,
        lora=LoraShape(r=16, alpha=32, dropout=0.0, targets="all-linear"),
    )
    settings: dict[str, Any] = {"epochs": 60.0, "max_steps": None, "learning_rate": 1e-2}
    settings.update(save_steps=50, holdout=0.25, check_rows=0)
    result = run(config, data, tmp_path / "a", **settings)
    stop, overfit = result.stop, result.overfit
    assert stop is not None and overfit is not None and stop.reason == "over-fitting"
    assert stop.detail == overfit.detail and stop.kept_step == overfit.good_step
    losses = {held.step: held.loss for held in result.evaluations}
    assert result.steps == max(losses) < 300
    assert result.eval_loss_after == pytest.approx(min(losses.values()), rel=1e-6)
    assert losses[overfit.good_step] == min(losses.values())
    assert all(losses[step] > min(losses.values()) for step in sorted(losses)[-2:])
    assert weights(result.adapter) == weights(tmp_path / "a" / f"best-{overfit.good_step}")

    on = run(config, data, tmp_path / "b", stop_on_overfit=False, **settings)
    assert on.stop is None and on.steps == 300
    assert on.overfit == overfit
    assert on.eval_loss_after is not None and result.eval_loss_after is not None
    assert on.eval_loss_after > result.eval_loss_after
    assert "over-fitting: the hold-out's loss rose from" in training_text(on)


def test_rows_that_the_model_knows_by_heart_are_flagged_not_dropped(
    tmp_path: Path, learnt: tuple[Path, Path]
) -> None:
    model, data = learnt
    settings: dict[str, Any] = {"max_steps": 2, "holdout": 0.0}
    said: list[str] = []
    result = run(config_of(model), data, tmp_path / "a", say=said.append, **settings)
    flagged = (tmp_path / "a/flagged-rows.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in flagged]
    assert [row["line"] for row in found] == list(range(1, 9))
    assert all(1 <= row["perplexity"] < 3 for row in found)
    assert result.known is not None and result.rows == 24
    assert (result.known.checked, result.known.flagged, result.known.dropped) == (24, 8, 0)
    assert result.known.share == pytest.approx(1 / 3)
    assert "8 of 24 rows looked at" in said[0] and "trained on all the same" in said[0]

    dropped = run(config_of(model), data, tmp_path / "b", drop_known=True, **settings)
    assert dropped.rows == 16
    assert dropped.known is not None and dropped.known.dropped == 8
    # Dropping them is the same as never having had them.
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(data.read_text().splitlines(keepends=True)[8:]))
    without = run(config_of(model), rest, tmp_path / "c", **settings)
    assert weights(dropped.adapter) == weights(without.adapter)

    few = run(config_of(model), data, tmp_path / "d", check_rows=5, **settings)
    assert few.known is not None and few.known.checked == 5
    none = run(config_of(model), data, tmp_path / "e", check_rows=0, **settings)
    assert none.known is None and not (tmp_path / "e/flagged-rows.jsonl").exists()


def test_dropping_every_row_is_refused(tmp_path: Path, learnt: tuple[Path, Path]) -> None:
    model, data = learnt
    some = data.with_name("some.jsonl")
    with pytest.raises(DataError, match=r"all 8 have a perplexity below 3; .* --drop-known"):
        run(config_of(model), some, tmp_path, drop_known=True, holdout=0.0)


@pytest.mark.parametrize(
    "changes",
    [{"trainer": "transformers"}, {"trainer": "trl", "loss": "fused"}, {"trainer": "loop"},
     {"trainer": "trl", "loss": "fused", "packing": True}],
    ids=["transformers", "trl", "loop", "trl-packed"],
)  # fmt: skip
def test_the_losses_of_the_held_out_rows_are_those_of_the_models(
    tmp_path: Path, tiny: Path, changes: dict[str, Any]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_advisor.probes.architectures import resolve_architecture
    from lora_advisor.probes.dataset import read_examples
    from lora_advisor.probes.tokens import load_tokenizer, split_holdout, tokenize

    data = tiny / "rows.jsonl"
    settings: dict[str, Any] = {"holdout": 0.25, "eval_batch": 3, "max_steps": 30}
    result = run(config_of(tiny, **changes), data, tmp_path, **settings)
    tokenizer = load_tokenizer(resolve_architecture(str(tiny)))
    _, held = split_holdout(tokenize(read_examples(data), tokenizer, 96).rows, 0.25, seed=0)
    plain: list[Any] = [
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2)
    ]
    means = []
    for model in (plain[0], PeftModel.from_pretrained(plain[1], result.adapter)):
        rows = []
        for row in held:  # one by one and written out, with no trainer and no padding
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            with torch.no_grad():
                beliefs = model(ids).logits[0, :-1].log_softmax(-1)
            rows.append(-float(beliefs[labels != -100, labels[labels != -100]].mean()))
        means.append(rows)
    assert json.loads((tmp_path / "holdout.json").read_text())["nats"] == pytest.approx(
        means[0], rel=1e-4
    )
    found = result.likelihood
    assert found is not None and found.rows == 10
    assert found.base_nats == pytest.approx(sum(means[0]) / 10, rel=1e-4)
    assert found.tuned_nats == pytest.approx(sum(means[1]) / 10, rel=1e-4)
    assert found.low_nats is not None and found.high_nats is not None
    assert 0 < found.low_nats < found.drop_nats < found.high_nats
    assert found.verdict == "clear"
    assert "(95 % interval" in training_text(result)


def losses_of(*nats: float) -> RowLosses:
    return RowLosses(nats=nats, tokens=(1,) * len(nats))


def test_a_drop_is_clear_small_none_or_worse() -> None:
    base = [3.0 + (n % 7) / 10 for n in range(50)]

    def verdict(*drops: float) -> str:
        tuned = (nats - drops[n % len(drops)] for n, nats in enumerate(base))
        return compare_rows(losses_of(*base), losses_of(*tuned)).verdict

    assert verdict(0.6, 0.7) == "clear"
    assert verdict(0.3, 0.4) == "small"
    assert verdict(0.9, -0.9) == "none"
    assert verdict(-0.3, -0.2) == "worse"
    assert compare_rows(losses_of(3.0), losses_of(1.0)).verdict == "unknown"


def test_the_interval_is_that_of_the_mean() -> None:
    draw = random.Random(2)
    drops = [draw.gauss(1.0, 0.5) for _ in range(400)]
    found = compare_rows(losses_of(*(5.0 + d for d in drops)), losses_of(*([5.0] * 400)))
    mean = sum(drops) / 400
    error = math.sqrt(sum((d - mean) ** 2 for d in drops) / 399 / 400)
    assert found.low_nats == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high_nats == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_one_step_that_stands_out_is_no_spike_and_three_are() -> None:
    calm = [2.0 + (n % 3) / 10 for n in range(15)]
    assert find_divergence([*calm, 7.0, 2.0, 2.1], 18, scaled=False) is None
    assert find_divergence([*calm, 4.0, 4.0, 4.0], 18, scaled=False) is None
    stop = find_divergence([*calm, 4.5, 4.5, 4.5], 1, scaled=False)
    assert stop is not None and (stop.step, stop.good_step) == (16, 14)
    climbed = find_divergence([*calm, 3.5, 3.5, 4.5, 4.5, 4.5], 1, scaled=False)
    assert climbed is not None and (climbed.step, climbed.good_step) == (18, 14)
    dipped = find_divergence([*calm, 3.5, 2.5, 4.5, 4.5, 4.5], 1, scaled=False)
    assert dipped is not None and (dipped.step, dipped.good_step) == (18, 14)
    # What stood out long before is not of this climb.
    apart = find_divergence([*calm, 7.0, *calm[:6], 4.5, 4.5, 4.5], 1, scaled=False)
    assert apart is not None and (apart.step, apart.good_step) == (23, 21)
    # Without ten steps before there is no baseline.
    assert find_divergence([*calm[:9], 9.0, 9.0, 9.0], 12, scaled=False) is None


def test_a_scaled_training_bears_single_steps_that_overflow() -> None:
    nan = float("nan")
    one = find_divergence([2.0, nan], 1, scaled=False)
    assert one is not None and (one.step, one.good_step) == (2, 0)
    assert find_divergence([2.0, nan, nan, 2.0], 4, scaled=True) is None
    three = find_divergence([2.0, 2.0, nan, nan, nan], 1, scaled=True)
    assert three is not None and three.step == 3


def test_over_fitting_needs_two_evaluations_above_the_best_and_a_falling_training_loss() -> None:
    def seen(*pairs: tuple[float, float]) -> list[HeldOut]:
        return [
            HeldOut(step=10 * (n + 1), loss=loss, train_loss=train)
            for n, (loss, train) in enumerate(pairs)
        ]

    assert find_overfit(seen((2.0, 2.0), (1.5, 1.5), (1.6, 1.2))) is None
    stop = find_overfit(seen((2.0, 2.0), (1.5, 1.5), (1.6, 1.2), (1.7, 1.0)))
    assert stop is not None and (stop.good_step, stop.step) == (20, 40)
    assert find_overfit(seen((2.0, 2.0), (1.5, 1.5), (1.6, 1.6), (1.7, 1.7))) is None
    assert find_overfit(seen((2.0, 2.0), (1.5, 1.5), (1.6, 1.2), (1.4, 1.0))) is None
    assert find_overfit(seen((2.0, 2.0), (1.5, 1.5), (1.6, 1.2), (1.51, 1.0))) is None
