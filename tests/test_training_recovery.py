"""A training that is cut short by memory, a signal, a full disk: what is kept, how it goes on."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_training import config_of, run, weights

from lora_advisor.advisor.recovery import smaller
from lora_advisor.advisor.run_folder import is_complete, last_complete_checkpoint
from lora_advisor.advisor.stopping import Interrupted
from lora_advisor.advisor.training import Progress, TrainingResult
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import OutputError, UnavailableError

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


@pytest.fixture(autouse=True)
def _reported_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_advisor.advisor.watch.REPORT_S", 0.0)


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return run(config_of(tiny), tiny / "rows.jsonl", tmp_path_factory.mktemp("unbroken"))


def still(tiny: Path, **changes: Any) -> RunConfig:
    """Return a configuration without dropout, whose steps do not depend on the micro-batch."""
    shape = LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear")
    return config_of(tiny, lora=shape, **changes)


class Device:
    """Stands for a device that is too small for some batches: raises as PyTorch does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.models.llama import modeling_llama

        self.too_small: Callable[[int, bool], bool] = lambda rows, training: False
        self.batches: list[tuple[tuple[int, int], bool]] = []
        plain = modeling_llama.LlamaModel.forward

        def forward(model: Any, input_ids: Any = None, **kwargs: Any) -> Any:
            self.batches.append((tuple(input_ids.shape), model.training))
            if self.too_small(len(input_ids), model.training):
                self.fail()
            return plain(model, input_ids=input_ids, **kwargs)

        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)

    def fail(self) -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_memory_that_runs_out_in_a_step_halves_the_micro_batch_and_keeps_the_step(
    tmp_path: Path, tiny: Path, device: Device
) -> None:
    from transformers import LlamaForCausalLM

    data, config = tiny / "rows.jsonl", still(tiny, trainer="trl", loss="fused")
    plain = run(config, data, tmp_path / "plain")
    models: list[weakref.ref[Any]] = []
    said: list[str] = []
    # Of other tests, which a trace may have kept from the collector.
    others = {id(m) for m in gc.get_objects() if type(m) is LlamaForCausalLM}

    def told(progress: Progress) -> None:
        alive = [m for m in gc.get_objects() if type(m) is LlamaForCausalLM and id(m) not in others]
        models.extend(weakref.ref(m) for m in alive if all(m is not known() for known in models))
        if progress.step == 6 and not said:
            device.too_small = lambda rows, training: training and rows > 1
        if progress.step > 6:
            assert len(alive) == 1  # the model that failed is gone
            assert [shape[0] for shape, training in device.batches if training][-4:] == [1] * 4

    result = run(config, data, tmp_path / "a", progress=told, say=said.append)
    (recovery,) = result.recoveries
    assert (recovery.micro_batch, recovery.new_micro_batch, recovery.new_accumulation) == (2, 1, 4)
    assert recovery.after_step == 4
    assert said == [
        "memory ran out with micro-batch 2; going on from checkpoint 4 with micro-batch 1 and 4 "
        "accumulation: as many rows in a step as before"
    ]
    assert len(models) == 2 and models[0]() is None
    assert (result.steps, result.config) == (12, config)
    # The same rows in each step, summed in another order.
    assert result.eval_loss_after == pytest.approx(plain.eval_loss_after, rel=1e-4)
    written = json.loads((tmp_path / "a" / "result.json").read_text())
    assert TrainingResult.from_json(written) == result
    events = [json.loads(line) for line in (tmp_path / "a/progress.jsonl").read_text().splitlines()]
    assert [e["text"] for e in events if e["event"] == "recovery"] == said


def test_a_training_that_went_on_smaller_stays_so_after_a_kill(
    tmp_path: Path, tiny: Path, device: Device
) -> None:
    data, config = tiny / "rows.jsonl", still(tiny)
    device.too_small = lambda rows, training: training and rows > 1

    def broken(progress: Progress) -> None:
        if progress.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, data, tmp_path / "a", progress=broken)
    device.batches.clear()
    result = run(config, data, tmp_path / "a")
    assert {shape[0] for shape, training in device.batches if training} == {1}
    assert len(result.recoveries) == 1 and result.recoveries[0].after_step == 0
    assert result.resumed_from_step == 4
    # Neither the kill nor the way there has left a trace in the weights.
    whole = run(config.replace(micro_batch=1, accumulation=4), data, tmp_path / "b")
    assert weights(result.adapter) == weights(whole.adapter)


def test_the_cpu_s_own_lack_of_memory_is_recovered_from(
    tmp_path: Path, tiny: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fail() -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(device, "fail", fail)
    device.too_small = lambda rows, training: training and rows > 2
    result = run(still(tiny, micro_batch=6, accumulation=1), tiny / "rows.jsonl", tmp_path)
    assert [(at.micro_batch, at.new_micro_batch) for at in result.recoveries] == [(6, 3), (3, 1)]
    assert result.recoveries[-1].new_accumulation == 6


def test_memory_for_not_even_one_row_is_said(tmp_path: Path, tiny: Path, device: Device) -> None:
    device.too_small = lambda rows, training: training
    with pytest.raises(UnavailableError, match="must have memory for micro_batch 1 of 96 tokens"):
        run(still(tiny), tiny / "rows.jsonl", tmp_path / "a")
    device.too_small = lambda rows, training: not training
    with pytest.raises(UnavailableError, match="must have memory to evaluate one row"):
        run(still(tiny), tiny / "rows.jsonl", tmp_path / "b")


def test_an_evaluation_has_a_batch_of_its_own_that_gives_way(
    tmp_path: Path, tiny: Path, device: Device
) -> None:
    data = tiny / "rows.jsonl"
    plain = run(still(tiny), data, tmp_path / "a", holdout=0.25, eval_batch=4)
    assert max(shape[0] for shape, training in device.batches if not training) == 4
    device.too_small = lambda rows, training: not training and rows > 2
    result = run(still(tiny), data, tmp_path / "b", holdout=0.25, eval_batch=8)
    (first, second) = result.recoveries
    assert (first.what, first.micro_batch, second.new_micro_batch) == ("evaluation", 8, 2)
    assert weights(result.adapter) == weights(plain.adapter)
    assert result.eval_loss_after == pytest.approx(plain.eval_loss_after, rel=1e-5)


def test_half_a_micro_batch_keeps_the_rows_of_a_step() -> None:
    sizes = []
    config: RunConfig | None = config_of(Path("m"), micro_batch=12, accumulation=2)
    while config is not None:
        sizes.append((config.micro_batch, config.accumulation))
        config = smaller(config)
    assert sizes == [(12, 2), (6, 4), (3, 8), (1, 24)]
    assert all(micro * accumulation == 24 for micro, accumulation in sizes)


@pytest.mark.parametrize("changes", [{}, {"trainer": "trl", "loss": "fused"}, {"trainer": "loop"}],
                         ids=["transformers", "trl", "loop"])  # fmt: skip
def test_the_longest_rows_come_first_and_leave_no_trace(
    tmp_path: Path, tiny: Path, device: Device, changes: dict[str, Any]
) -> None:
    from transformers import set_seed

    from lora_advisor.advisor.schedule import Settings
    from lora_advisor.probes.architectures import resolve_architecture
    from lora_advisor.probes.dataset import read_examples
    from lora_advisor.probes.finetune import build_trainer
    from lora_advisor.probes.tokens import load_tokenizer, split_holdout, tokenize
    from lora_advisor.probes.weights import load_model

    config, data = config_of(tiny, **changes), tiny / "rows.jsonl"
    result = run(config, data, tmp_path / "a", eval_steps=5)
    architecture = resolve_architecture(config.model)
    tokenizer = load_tokenizer(architecture)
    rows, held = split_holdout(tokenize(read_examples(data), tokenizer, 96).rows, 0.1, seed=0)
    trained = [shape for shape, training in device.batches if training]
    longest = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    assert trained[0] == (2, longest[0])
    assert len(trained) == 1 + 12 * 2

    # The same steps with nothing around them: no evaluation, no guard, no rows tried first.
    settings = Settings(
        epochs=1.0, max_steps=12, learning_rate=5e-3, holdout=0.1, seed=0, save_steps=100,
        eval_batch=None,
    )  # fmt: skip
    set_seed(0)
    trainer = build_trainer(
        config,
        load_model(config, architecture, "cpu"),
        rows=rows,
        tokenizer=tokenizer,
        schedule=settings.schedule(config, rows=len(rows), held=held, output=tmp_path / "b"),
        device="cpu",
    )
    set_seed(0)
    trainer.train()
    trainer.save_model(str(tmp_path / "b" / "adapter"))
    assert weights(tmp_path / "b" / "adapter") == weights(result.adapter)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_training_with_a_checkpoint_that_goes_on_exactly(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult, number: int, code: int
) -> None:
    before = signal.getsignal(number)

    def told(progress: Progress) -> None:
        if progress.step == 6:
            os.kill(os.getpid(), number)

    said: list[str] = []
    with pytest.raises(Interrupted, match=r"the checkpoint of step 7 holds .* goes on") as stopped:
        run(config_of(tiny), tiny / "rows.jsonl", tmp_path, progress=told, say=said.append)
    assert stopped.value.exit_code == code
    assert said == ["stopping at the end of this step; once more to stop at once"]
    assert signal.getsignal(number) is before
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-7"
    result = run(config_of(tiny), tiny / "rows.jsonl", tmp_path)
    assert result.resumed_from_step == 7
    assert weights(result.adapter) == weights(unbroken.adapter)


#: A process that trains, and gets SIGTERM twice in step 6, or once while it evaluates.
SIGNALLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny_training, torch
import lora_advisor.advisor.watch
from lora_advisor.advisor.stopping import Interrupted
lora_advisor.advisor.watch.REPORT_S = 0.0
torch.set_num_threads(1)
model, output, when = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]

def told(progress):
    if when == "twice" and progress.step == 6:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

if when == "evaluating":
    from transformers.models.llama.modeling_llama import LlamaModel
    plain = LlamaModel.forward
    def forward(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **kwargs)
    LlamaModel.forward = forward
try:
    tiny_training.run(
        tiny_training.config_of(model), model / "rows.jsonl", output, progress=told
    )
except Interrupted as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize(("when", "code"), [("twice", -15), ("evaluating", 143)])
def test_a_second_signal_and_one_between_steps_end_it_at_once(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult, when: str, code: int
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(Path(__file__).parent), tiny, tmp_path, when],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert ended.returncode == code, ended.stderr[-2000:]
    if when == "evaluating":
        assert "stopped by SIGTERM; the last checkpoint holds" in ended.stderr
    result = run(config_of(tiny), tiny / "rows.jsonl", tmp_path)
    assert result.resumed_from_step == (4 if when == "twice" else None)
    assert weights(result.adapter) == weights(unbroken.adapter)


@pytest.mark.parametrize("limit", [2_000, 50_000], ids=["adapter", "optimizer"])
def test_a_full_disk_is_said_and_the_checkpoint_before_is_whole(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult, limit: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def told(progress: Progress) -> None:
        if progress.step == 6:  # from now on no file may be larger: writing fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    try:
        with pytest.raises(OutputError, match=r"checkpoint 4 is whole: make room") as full:
            run(config_of(tiny), tiny / "rows.jsonl", tmp_path, progress=told)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(full.value)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    result = run(config_of(tiny), tiny / "rows.jsonl", tmp_path)
    assert result.resumed_from_step == 4
    assert weights(result.adapter) == weights(unbroken.adapter)


def test_progress_is_written_for_programs_too(tmp_path: Path, tiny: Path) -> None:
    def broken(progress: Progress) -> None:
        if progress.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config_of(tiny), tiny / "rows.jsonl", tmp_path, progress=broken)
    file = tmp_path / "progress.jsonl"
    with file.open("a") as stream:
        stream.write('{"event": "prog')  # as a power loss leaves it
    run(config_of(tiny), tiny / "rows.jsonl", tmp_path)
    torn, lines = 0, []
    for line in file.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            torn += 1
    assert torn == 1
    assert [line["step"] for line in lines] == [*range(1, 7), *range(5, 13)]
    assert {"loss", "tokens_per_s", "peak_bytes", "power_w", "seconds_left"} <= set(lines[0])
    assert lines[0]["power_w"] is None  # there is no board to ask


@pytest.mark.skipif(
    find_spec("tensorboard") is not None or find_spec("tensorboardX") is not None,
    reason="TensorBoard is installed",
)
def test_a_missing_tensorboard_is_said(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(UnavailableError, match="needs the package tensorboard"):
        run(config_of(tiny), tiny / "rows.jsonl", tmp_path / "out", tensorboard=True)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_fp16_on_a_gpu_needs_its_scaler(
    tmp_path: Path, unbroken: TrainingResult
) -> None:
    import torch
    from transformers import trainer

    shutil.copytree(unbroken.adapter.parent, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoint-12"
    assert is_complete(folder) and not is_complete(folder, scaler=True)
    scaler: Any = torch.amp.GradScaler("cpu")
    file = folder / trainer.SCALER_NAME  # the name that Trainer writes
    torch.save(scaler.state_dict(), file)
    assert is_complete(folder, scaler=True)
    file.write_bytes(file.read_bytes()[:100])
    assert not is_complete(folder, scaler=True)
    assert last_complete_checkpoint(tmp_path, scaler=True) is None


@pytest.mark.parametrize("model_step", [3, 9])
def test_the_best_model_is_there_after_a_kill(
    tmp_path: Path, tiny: Path, unbroken: TrainingResult, model_step: int
) -> None:
    def broken(progress: Progress) -> None:
        if progress.step == model_step + 1:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"eval_steps": 3, "save_steps": 4}
    whole = run(config_of(tiny), tiny / "rows.jsonl", tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(config_of(tiny), tiny / "rows.jsonl", tmp_path / "a", progress=broken, **settings)
    result = run(config_of(tiny), tiny / "rows.jsonl", tmp_path / "a", **settings)
    assert [held.step for held in whole.evaluations] == [3, 6, 9, 12]
    assert result.evaluations == whole.evaluations
    assert weights(result.adapter) == weights(whole.adapter) == weights(unbroken.adapter)
