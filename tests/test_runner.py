"""Probes in child processes: however one ends, the end is a result and nothing is left behind.

Real probes of a tiny random model on the CPU; a child that trains costs some 7 s, for its imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lora_advisor.probes.architectures import Architecture, from_hf_config
from lora_advisor.probes.child import Ending, answer_of
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import BusyError, UsageError
from lora_advisor.probes.exchange import Answer, Request
from lora_advisor.probes.machine import cpu_machine, detect_machine, detect_stack, gpu_present
from lora_advisor.probes.meter import attention_of
from lora_advisor.probes.record import ProbeResult, read_records
from lora_advisor.probes.rivals import Rivals
from lora_advisor.probes.runner import capped_bytes, context_bytes_of, run_probe
from lora_advisor.probes.stopwatch import PATIENCE
from lora_advisor.probes.worker import first_line, is_out_of_memory

GIB = 2**30

HF_CONFIG = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1000,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip

CONFIG = {
    "model": "tiny", "method": "lora", "micro_batch": 2, "accumulation": 1, "seq_len": 32,
    "optimizer": "adamw_torch", "precision": "fp32", "checkpointing": "off", "attention": "sdpa",
    "kernels": "none", "loss": "fused", "compile": "off", "allocator": "default",
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"},
}  # fmt: skip

#: One layer at rank 4: a factor pair has 4 x (inputs + outputs) parameters.
#: q and o: 64 to 64; k and v: 64 to 32 (2 of 4 heads); gate and up: 64 to 128; down: 128 to 64.
TRAINABLE = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


def tiny() -> Architecture:
    return from_hf_config("tiny", HF_CONFIG)


def probe(
    record: Path | None,
    *,
    cap_bytes: int | None = None,
    timeout_s: float = 120.0,
    kernels: str = "none",
) -> ProbeResult:
    """Run the tiny model's probe on the CPU."""
    return run_probe(
        RunConfig.from_json({**CONFIG, "kernels": kernels}),
        tiny(),
        cpu_machine(),
        detect_stack(),
        cap_bytes=cap_bytes,
        record=record,
        device="cpu",
        timeout_s=timeout_s,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def workers(parent: int) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(parent).children()
        if "lora_advisor.probes.worker" in process.cmdline()
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProbeResult, Path]:
    """A probe that ended well, of a parent that holds more memory than its child ever will."""
    folder = tmp_path_factory.mktemp("finished")
    record = folder / "record.jsonl"
    ballast = b"x" * GIB
    with contextlib.chdir(folder):
        result = probe(record)
    assert len(ballast) == GIB
    return result, record


def test_a_probe_that_ends_well_has_timed_its_steps(finished: tuple[ProbeResult, Path]) -> None:
    result, _ = finished
    assert (result.outcome, result.detail) == ("ok", None)
    assert 6 <= len(result.step_times_s) <= PATIENCE * 6  # more where they vary
    assert result.unstable is not None
    assert all(
        0 < host <= wall
        for host, wall in zip(result.host_times_s, result.step_times_s, strict=True)
    )
    assert result.tokens_per_step == 2 * 32
    assert result.warmup_s is not None
    assert result.startup_s is not None
    assert 0 < result.warmup_s < 60
    assert 0.5 < result.startup_s < 60


def test_a_probe_on_a_cpu_says_what_a_cpu_can_say(finished: tuple[ProbeResult, Path]) -> None:
    result, _ = finished
    assert result.trainable == TRAINABLE
    assert result.attention_backend == "cpu_sdpa"
    assert result.device_times_s == ()
    assert (result.allocated_bytes, result.reserved_bytes, result.context_bytes) == (None,) * 3
    assert (result.joules, result.power_w, result.energy_source) == (None,) * 3
    assert (result.sm_clock_mhz, result.throttled, result.contended) == (None,) * 3


def test_the_peak_is_the_childs_own_and_not_its_parents(
    finished: tuple[ProbeResult, Path],
) -> None:
    # The parent held a GiB at least; a process that has imported torch holds 200 MB at least.
    peak = finished[0].process_bytes
    assert peak is not None
    assert 200e6 < peak < GIB


def test_a_probe_that_ends_well_is_on_disk(finished: tuple[ProbeResult, Path]) -> None:
    result, record = finished
    assert read_records(record) == [result]


def test_a_probe_leaves_no_child_and_no_file(finished: tuple[ProbeResult, Path]) -> None:
    assert workers(os.getpid()) == []
    assert list(finished[1].parent.iterdir()) == [finished[1]]


def test_a_probe_above_its_memory_budget_is_out_of_memory(tmp_path: Path) -> None:
    budget = 100_000_000  # torch alone takes twice that
    result = probe(tmp_path / "record.jsonl", cap_bytes=budget)
    assert result.outcome == "out_of_memory"
    assert result.process_bytes is not None
    assert result.process_bytes > budget
    assert workers(os.getpid()) == []
    assert read_records(tmp_path / "record.jsonl") == [result]


def test_a_probe_that_takes_too_long_is_timed_out(tmp_path: Path) -> None:
    result = probe(tmp_path / "record.jsonl", timeout_s=0.5)
    assert (result.outcome, result.detail) == ("timed_out", "stopped after 0.5 s")
    assert workers(os.getpid()) == []
    assert read_records(tmp_path / "record.jsonl") == [result]


def test_a_child_killed_from_outside_is_a_failed_probe(tmp_path: Path) -> None:
    def kill_the_child() -> None:
        wait_for(lambda: workers(os.getpid()) != [])
        workers(os.getpid())[0].kill()

    killer = threading.Thread(target=kill_the_child)
    killer.start()
    result = probe(tmp_path / "record.jsonl")
    killer.join()
    assert result.outcome == "failed"
    assert result.detail is not None
    assert "killed by SIGKILL" in result.detail
    assert read_records(tmp_path / "record.jsonl") == [result]


def test_a_probe_of_what_this_machine_cannot_run_says_why(tmp_path: Path) -> None:
    result = probe(tmp_path / "record.jsonl", kernels="liger")
    assert result.outcome == "failed"
    assert result.detail == '`kernels` "liger" needs a GPU: its kernels are written in Triton.'


def start_parent(record: Path) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """Start a Python process that runs a probe, and return it with its child."""
    code = f"""
import signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
# A shell starts what it puts in the background with SIGINT ignored, and children keep that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from test_runner import probe
probe(Path({str(record)!r}))
"""
    environment = {**os.environ, "TMPDIR": str(record.parent)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: workers(parent.pid) != [])
    return parent, workers(parent.pid)[0]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_probe_stopped_by_the_user_is_written_down_as_interrupted(
    tmp_path: Path, number: signal.Signals
) -> None:
    parent, child = start_parent(tmp_path / "record.jsonl")
    parent.send_signal(number)
    assert parent.wait(30) != 0
    assert is_gone(child)
    assert [one.outcome for one in read_records(tmp_path / "record.jsonl")] == ["interrupted"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_child_ends_with_a_parent_that_could_not_say_goodbye(tmp_path: Path) -> None:
    parent, child = start_parent(tmp_path / "record.jsonl")
    parent.kill()
    parent.wait(30)
    wait_for(lambda: is_gone(child), seconds=5)


def test_a_crash_without_an_answer_tells_the_last_line() -> None:
    request = Request(config=RunConfig.from_json(CONFIG), architecture=tiny(), device="cuda")
    assert answer_of(Ending(status=3), None, "one\ntwo\n\n", request) == Answer(
        outcome="failed", detail="the process ended with status 3: two"
    )
    killed = answer_of(Ending(status=-signal.SIGSEGV), None, "", request)
    assert killed.detail == "the process was killed by SIGSEGV: it said nothing"
    # The last words of bitsandbytes 0.50 where a paged optimizer finds no memory.
    last = "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp"
    assert answer_of(Ending(status=1), None, last, request).outcome == "out_of_memory"


def test_an_answer_given_before_a_crash_counts() -> None:
    request = Request(config=RunConfig.from_json(CONFIG), architecture=tiny(), device="cuda")
    given = Answer(outcome="ok", step_times_s=(1.0,))
    assert answer_of(Ending(status=-signal.SIGSEGV), given, "", request) is given


def test_errors_that_mean_no_memory_are_told_from_others() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(MemoryError())
    outer = RuntimeError("the compiler failed")
    outer.__cause__ = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    assert is_out_of_memory(outer)
    assert not is_out_of_memory(RuntimeError("expected scalar type Half"))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory"))


def test_an_error_is_told_in_one_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(UsageError("Both must hold.")) == "Both must hold."


@pytest.mark.parametrize(
    ("operations", "kernel"),
    [
        ({"aten::mm", "aten::_scaled_dot_product_flash_attention"}, "flash"),
        ({"aten::_scaled_dot_product_cudnn_attention_backward"}, "cudnn"),
        ({"aten::_scaled_dot_product_efficient_attention", "aten::_softmax"}, "efficient"),
        ({"aten::_scaled_dot_product_attention_math", "aten::_softmax"}, "math"),
        ({"flash_attn::_flash_attn_forward"}, "flash"),
        ({"aten::mm", "aten::_softmax"}, "eager"),
        ({"aten::mm", "aten::_log_softmax"}, None),
        (
            {
                "aten::_scaled_dot_product_flash_attention",
                "aten::_scaled_dot_product_efficient_attention",
            },
            "efficient+flash",
        ),
    ],
)
def test_the_attention_kernel_is_read_from_the_operations(
    operations: set[str], kernel: str | None
) -> None:
    assert attention_of(operations) == kernel


def test_a_rival_on_the_gpu_is_refused_or_marked() -> None:
    with pytest.raises(BusyError, match="must be free while a probe is timed, but process 7, 12"):
        Rivals(lambda: {12, 7}, allowed=False)
    assert Rivals(lambda: {12, 7}, allowed=True).seen is True
    assert Rivals(lambda: set(), allowed=False).seen is False
    assert Rivals(lambda: None, allowed=False).seen is None


def test_a_rival_that_comes_later_is_marked_and_the_child_is_not_one() -> None:
    now: set[int] = set()
    rivals = Rivals(lambda: now, allowed=False)
    now = {100}
    rivals.look()
    assert rivals.seen is False
    now = {100, 200}
    rivals.look()
    now = {100}
    rivals.look()
    assert rivals.seen is True


def test_a_request_that_measures_nothing_is_refused() -> None:
    config = RunConfig.from_json(CONFIG)
    with pytest.raises(UsageError, match="`warmup_steps` must be at least 2"):
        Request(config=config, architecture=tiny(), device="cpu", warmup_steps=1)
    with pytest.raises(UsageError, match="`measured_steps` must be at least 1"):
        Request(config=config, architecture=tiny(), device="cpu", measured_steps=0)
    with pytest.raises(UsageError, match="`device` must be"):
        Request(config=config, architecture=tiny(), device="none")


def test_the_cap_is_what_the_context_and_the_reserve_leave() -> None:
    assert capped_bytes(8 * GIB, 618 * 2**20, 0) == 7_941_914_624  # 8192 - 618 = 7574 MiB
    with pytest.raises(UsageError, match=r"0\.50 GiB less 0\.60 GiB and 0\.00 GiB leaves nothing"):
        capped_bytes(GIB // 2, 618 * 2**20, 0)


def test_a_probe_on_a_host_of_several_gpus_sees_the_first_that_is_visible() -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from lora_advisor.probes.exchange import Request\n"
        "from lora_advisor.probes.worker import set_environment\n"
        "set_environment(Request.read(Path(sys.argv[1])))\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'])"
    )
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "request.json"
        Request(config=RunConfig.from_json(CONFIG), architecture=tiny(), device="cuda").write(file)
        for visible, seen in (("0,1", "0"), ("3", "3"), ("GPU-12ab,0", "GPU-12ab"), ("-1", "-1")):
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
            said = subprocess.run(
                [sys.executable, "-c", code, str(file)],
                env=environment, check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert said.stdout.split() == [seen, "PCI_BUS_ID"]


def test_a_cpu_has_no_context() -> None:
    assert context_bytes_of(cpu_machine()) is None


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_present(), reason="needs a GPU")
def test_a_probe_on_a_gpu_stays_under_its_cap(tmp_path: Path) -> None:
    machine = detect_machine("cuda")
    context = context_bytes_of(machine)
    assert context is not None
    cap = 2 * GIB
    result = run_probe(
        RunConfig.from_json({**CONFIG, "precision": "bf16", "seq_len": 128}),
        tiny(),
        machine,
        detect_stack(),
        cap_bytes=cap,
        record=tmp_path / "record.jsonl",
        device="cuda",
    )
    assert result.outcome == "ok", result.detail
    assert result.allocated_bytes is not None
    assert result.reserved_bytes is not None
    assert 0 < result.allocated_bytes <= result.reserved_bytes <= cap
    assert len(result.device_times_s) == len(result.step_times_s) >= 6
    assert result.energy_source is not None
    assert result.sm_clock_mhz is not None
    assert result.throttled is not None
    assert result.attention_backend in ("flash", "cudnn", "efficient", "math")
    too_small = run_probe(
        RunConfig.from_json({**CONFIG, "precision": "bf16", "micro_batch": 64, "seq_len": 256}),
        tiny(),
        machine,
        detect_stack(),
        cap_bytes=20 * 2**20,
        record=tmp_path / "record.jsonl",
        device="cuda",
    )
    assert too_small.outcome == "out_of_memory", too_small.detail
