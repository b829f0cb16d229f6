from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real_model
import tiny_model
from tiny_training import config_of, run, weights

from lora_advisor.advisor.run_folder import is_complete, last_complete_checkpoint
from lora_advisor.advisor.training import Predicted, Progress, TrainingResult
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape
from lora_advisor.probes.errors import (
    AdvisorError,
    OutputError,
    StackError,
    UnavailableError,
    UsageError,
)

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

#: GSM8K (MIT), where it lies beside the repository, of which it is no part.
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that two runs can be compared bit by bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed_logits(model: Path, adapter: Path) -> float:
    """Reload the adapter the way a user does; return how far it moves the logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(adapter)("What is 5?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(ids).logits.clone()
        after = PeftModel.from_pretrained(base, adapter)(ids).logits
    return float((after - before).abs().max())


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": "trl", "loss": "fused"},
        {"trainer": "trl", "loss": "fused", "precision": "bf16", "checkpointing": "full"},
        {"trainer": "transformers", "accumulation": 1, "micro_batch": 4},
        {"trainer": "loop"},
    ],
    ids=["trl", "trl-bf16-checkpointing", "transformers", "loop"],
)
def test_training_lowers_the_loss_and_leaves_an_adapter(
    tmp_path: Path, tiny: Path, changes: dict[str, Any]
) -> None:
    reports: list[Progress] = []
    promised = Predicted(padded_tokens_per_s=1000.0, peak_bytes=2**30, train_seconds=3.0)
    result = run(
        config_of(tiny, **changes),
        tiny / "rows.jsonl",
        tmp_path,
        predicted=promised,
        progress=reports.append,
    )
    assert result.eval_loss_before is not None and result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before - 0.3
    assert (result.rows, result.holdout_rows, result.steps) == (36, 4, 12)
    assert changed_logits(tiny, result.adapter) > 0.1
    assert result.measured.steps_measured == 9
    assert result.measured.tokens_per_s is not None
    assert result.measured.padded_tokens_per_s is not None
    assert 0 < result.measured.tokens_per_s < result.measured.padded_tokens_per_s
    assert result.predicted == promised
    assert not (tmp_path / "README.md").exists()  # TRL's card of a model without a name
    assert [report.step for report in (reports[0], reports[-1])] == [1, 12]
    assert reports[-1].seconds_left == 0
    written = json.loads((tmp_path / "result.json").read_text())
    assert TrainingResult.from_json(written) == result


def test_the_loss_before_is_that_of_the_model_as_it_came(tmp_path: Path, tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from lora_advisor.probes.dataset import read_examples
    from lora_advisor.probes.tokens import load_tokenizer, split_holdout, tokenize

    data = tiny / "rows.jsonl"
    result = run(config_of(tiny), data, tmp_path, max_steps=1, eval_batch=3)
    tokenizer = load_tokenizer(resolve_architecture(str(tiny)))
    _, held = split_holdout(tokenize(read_examples(data), tokenizer, 96).rows, 0.1, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    loss = tokens = 0.0
    for row in held:  # one by one and written out, with no trainer and no padding
        with torch.no_grad():
            scores = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label != -100:
                loss, tokens = loss - float(scores[place - 1, label]), tokens + 1
    assert result.eval_loss_before == pytest.approx(loss / tokens, rel=1e-5)


def test_an_evaluation_before_does_not_change_the_steps_after(tmp_path: Path, tiny: Path) -> None:
    import torch
    from transformers import set_seed

    from lora_advisor.advisor.evaluation import evaluate
    from lora_advisor.probes.dataset import random_rows
    from lora_advisor.probes.finetune import Schedule, build_trainer
    from lora_advisor.probes.tokens import load_tokenizer
    from lora_advisor.probes.weights import load_model

    # With autocast the evaluation's preparation of the model and the training's differ.
    config = config_of(tiny, precision="bf16", seq_len=32)
    architecture = resolve_architecture(config.model)
    rows = random_rows(8, 32, 259)
    trained = []
    for evaluated in (False, True):
        set_seed(0)
        trainer = build_trainer(
            config,
            load_model(config, architecture, "cpu"),
            rows=rows,
            tokenizer=load_tokenizer(architecture),
            schedule=Schedule(max_steps=2, output_dir=str(tmp_path), eval_rows=rows),
            device="cpu",
        )
        if evaluated:
            evaluate(trainer)
        set_seed(0)
        model: Any = trainer.model
        seen: list[bool] = []
        layer = next(m for m in model.modules() if type(m).__name__ == "LlamaMLP")
        layer.register_forward_hook(
            lambda *_, seen=seen: seen.append(torch.is_autocast_enabled("cpu"))
        )
        trainer.train()
        assert seen == [True] * 4  # two steps of two micro-batches
        trained.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=0)


def test_a_quantised_model_learns_after_it_was_evaluated(tmp_path: Path, tiny: Path) -> None:
    import torch

    from lora_advisor.probes.weights import load_model

    # On a CPU with AVX512-BF16 bitsandbytes would repack the weights in the evaluation, and the
    # gradients after it would be wrong (weights.keep_trainable). So they must not change.
    config = config_of(tiny, method="qlora")
    architecture = resolve_architecture(config.model)
    ids = torch.arange(3, 67).reshape(2, 32)
    gradients = []
    for evaluated in (False, True):
        model: Any = load_model(config, architecture, "cpu")
        if evaluated:
            with torch.no_grad():
                model.eval()(ids)
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.train()(inputs_embeds=embeddings, labels=ids).loss.backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)

    result = run(config, tiny / "rows.jsonl", tmp_path)
    assert result.eval_loss_before is not None and result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before - 0.3


#: A process that trains like `run`, and is killed (SIGKILL) when `torch.save` is called for the
#: named file of the named checkpoint, half of it written; or at the step, if that is a number.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_training, torch

model, output, when = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
save = torch.save

def torn(content, file, *args, **kwargs):
    save(content, file, *args, **kwargs)
    if str(file).endswith(when):
        with open(file, "r+b") as stream:
            stream.truncate(Path(file).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

def told(progress):
    if str(progress.step) == when:
        os.kill(os.getpid(), signal.SIGKILL)

import lora_advisor.advisor.watch
lora_advisor.advisor.watch.REPORT_S = 0.0
torch.save = torn
torch.set_num_threads(1)
test_training.run(test_training.config_of(model), model / "rows.jsonl", output, progress=told)
"""


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return run(config_of(tiny), tiny / "rows.jsonl", tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize(
    ("when", "goes_on_from"),
    [("2", None), ("7", 4), ("checkpoint-8/optimizer.pt", 4), ("checkpoint-12/rng_state.pth", 8)],
    ids=["before-any", "between", "while-writing", "while-writing-the-last"],
)
def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult, when: str, goes_on_from: int | None
) -> None:
    tests = str(Path(__file__).parent)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, tests, str(tiny), str(tmp_path), when],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert ended.returncode == -9, ended.stderr[-2000:]
    assert not (tmp_path / "result.json").exists()
    result = run(config_of(tiny), tiny / "rows.jsonl", tmp_path)
    assert result.resumed_from_step == goes_on_from
    assert weights(result.adapter) == weights(unbroken.adapter)
    assert result.eval_loss_before == unbroken.eval_loss_before
    assert result.eval_loss_after == unbroken.eval_loss_after
    assert result.steps == unbroken.steps


def test_a_broken_training_with_rows_grouped_by_length_goes_on_to_the_same_weights(
    tmp_path: Path, tiny: Path
) -> None:
    config, data = config_of(tiny, group_by_length=True), tiny / "rows.jsonl"

    def broken(progress: Progress) -> None:
        if progress.step == 12:
            raise KeyboardInterrupt

    settings = {"save_steps": 5, "max_steps": 12}
    unbroken = run(config, data, tmp_path / "unbroken", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(config, data, tmp_path / "broken", progress=broken, **settings)
    result = run(config, data, tmp_path / "broken", **settings)

    # A pass has 9 steps, so this is within the second one.
    assert result.resumed_from_step == 10
    assert weights(result.adapter) == weights(unbroken.adapter)
    assert result.eval_loss_after == unbroken.eval_loss_after


def test_a_training_computes_the_tokens_that_were_counted_before_it(
    tmp_path: Path, tiny: Path
) -> None:
    from lora_advisor.advisor.lengths import epoch_of
    from lora_advisor.probes.arguments import padding_multiple
    from lora_advisor.probes.batching import BATCHINGS, with_batching
    from lora_advisor.probes.dataset import read_examples
    from lora_advisor.probes.tokens import load_tokenizer, tokenize

    tokenizer = load_tokenizer(resolve_architecture(str(tiny)))
    rows = tokenize(read_examples(tiny / "rows.jsonl"), tokenizer, 96).rows
    lengths = [len(row["input_ids"]) for row in rows]
    for name in BATCHINGS:
        config = with_batching(config_of(tiny, trainer="trl", loss="fused"), name)
        result = run(config, tiny / "rows.jsonl", tmp_path / name, max_steps=None, holdout=0.0)
        epoch = epoch_of(
            lengths, name, seq_len=96, micro_batch=2, accumulation=2,
            multiple=padding_multiple(config) or 1,
        )  # fmt: skip
        measured = result.measured
        assert result.steps == epoch.optimizer_steps
        assert measured.tokens_per_s is not None and measured.padded_tokens_per_s is not None
        padding = 1 - measured.tokens_per_s / measured.padded_tokens_per_s
        assert padding == pytest.approx(epoch.padding_share, abs=0.02)


def test_a_training_killed_after_its_last_checkpoint_only_ends(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult
) -> None:
    shutil.copytree(unbroken.adapter.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "adapter")
    reports: list[Progress] = []
    result = run(config_of(tiny), tiny / "rows.jsonl", tmp_path, progress=reports.append)
    assert (result.resumed_from_step, result.steps, reports) == (12, 12, [])
    assert weights(result.adapter) == weights(unbroken.adapter)
    assert result.eval_loss_after == unbroken.eval_loss_after
    # The time of the process before is not lost.
    assert result.measured.train_seconds > 0.5 * unbroken.measured.train_seconds


@pytest.mark.parametrize(
    "name",
    [
        "trainer_state.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    ],
)
def test_a_checkpoint_with_a_torn_or_missing_file_is_skipped(
    tmp_path: Path, unbroken: TrainingResult, name: str
) -> None:
    shutil.copytree(unbroken.adapter.parent, tmp_path, dirs_exist_ok=True)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    file = tmp_path / "checkpoint-12" / name
    whole = file.read_bytes()
    for torn in (whole[:-20], whole[: len(whole) // 2], b""):
        file.write_bytes(torn)
        assert not is_complete(file.parent)
    file.unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert not file.parent.exists()


def test_a_training_that_has_ended_is_reported_not_repeated(
    tiny: Path, unbroken: TrainingResult
) -> None:
    assert run(config_of(tiny), tiny / "rows.jsonl", unbroken.adapter.parent) == unbroken


def test_another_training_in_the_folder_is_refused(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult
) -> None:
    shutil.copytree(unbroken.adapter.parent, tmp_path, dirs_exist_ok=True)
    data, config = tiny / "rows.jsonl", config_of(tiny)
    with pytest.raises(UsageError, match="training with seq_len 96, but this one has 64; give ano"):
        run(config.replace(seq_len=64), data, tmp_path)
    with pytest.raises(UsageError, match=r"training with learning_rate 0\.005"):
        run(config, data, tmp_path, learning_rate=1e-4)
    tiny_model.save_rows(tmp_path / "other.jsonl", count=30)
    with pytest.raises(UsageError, match="training with data"):
        run(config, tmp_path / "other.jsonl", tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    state["stack"]["torch"] = "1.0"
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(StackError, match=r"begun with torch 1\.0, which cannot go on exactly"):
        run(config, data, tmp_path)
    state["stack"]["step"] = 1  # said alone: it is no package that could be installed
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(StackError, match="whose training step is another one, so it cannot go on"):
        run(config, data, tmp_path)
    again = run(config, data, tmp_path, resume=False, max_steps=1, holdout=0)
    assert (again.steps, again.eval_loss_before, again.eval_loss_after) == (1, None, None)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_folder_that_is_not_ours_or_cannot_be_written_is_refused(
    tmp_path: Path, tiny: Path
) -> None:
    (tmp_path / "a" / "checkpoint-5").mkdir(parents=True)
    for resume in (True, False):
        with pytest.raises(UsageError, match="holds checkpoint-5 of another; give another folder"):
            run(config_of(tiny), tiny / "rows.jsonl", tmp_path / "a", resume=resume)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="must be a folder that can be written"):
        run(config_of(tiny), tiny / "rows.jsonl", tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("failure", "kind", "sentence"),
    [
        (OSError(28, "No space left on device"), OutputError, "must take checkpoints .* No space"),
        (MemoryError(), UnavailableError, "must have memory for micro_batch 2 of 96 tokens"),
        (ZeroDivisionError("a defect"), ZeroDivisionError, "a defect"),
    ],
)
def test_a_full_disk_and_a_full_device_are_said_and_a_defect_is_not_dressed_up(
    tmp_path: Path, tiny: Path, failure: Exception, kind: type[Exception], sentence: str
) -> None:
    def fail(_: Progress) -> None:
        raise failure

    with pytest.raises(kind, match=sentence):
        run(config_of(tiny), tiny / "rows.jsonl", tmp_path, progress=fail)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0.0}, "`epochs` must be above 0"),
        ({"max_steps": 0}, "`max_steps` must be at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"holdout": 1.0}, r"`holdout` must lie in \[0, 1\)"),
        ({"save_steps": 0}, "`save_steps` must be at least 1"),
        ({"eval_batch": 0}, "`eval_batch` must be at least 1"),
    ],
)
def test_impossible_wishes_are_refused(
    tmp_path: Path, tiny: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AdvisorError, match=sentence):
        run(config_of(tiny), tiny / "rows.jsonl", tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_real_weights_learn_real_data(tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not here")
    model = real_model.smollm2_folder()
    data = tmp_path / "slice.jsonl"
    with GSM8K.open(encoding="utf-8") as lines:
        data.write_text("".join(line for line, _ in zip(lines, range(72), strict=False)))
    config = config_of(
        model,
        trainer="trl",
        loss="fused",
        micro_batch=4,
        accumulation=1,
        seq_len=192,
        lora=LoraShape(r=8, alpha=16, dropout=0.0, targets="all-linear"),
    )
    result = run(config, data, tmp_path / "out", max_steps=8, learning_rate=1e-3, save_steps=100)
    assert result.eval_loss_before is not None and result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before - 0.15  # falls by 0.36
    assert changed_logits(model, result.adapter) > 0.1
