"""The fork server: a fork is as good as a process of its own, and nothing it meets stops a plan.

One real server on the CPU serves most tests; its imports cost some 7 s.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy
import psutil
import pytest
from recorded import configure
from recorded import tiny as figures
from test_runner import CONFIG, is_gone, tiny, wait_for

from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UntraceableError
from lora_advisor.probes.events import Trace
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack, gpu_present
from lora_advisor.probes.record import ProbeResult, read_records
from lora_advisor.probes.runner import run_probe
from lora_advisor.probes.trace_batch import Batch, Made

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep the threads of a step this small from waiting for each other on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def server(_one_thread: None) -> Iterator[ForkServer]:
    with ForkServer(offline=True) as server:
        yield server


def probe(
    server: ForkServer | None, record: Path | None = None, *, timeout_s: float = 120.0
) -> ProbeResult:
    """Run the tiny model's probe on the CPU."""
    return run_probe(
        RunConfig.from_json(CONFIG),
        tiny(),
        cpu_machine(),
        detect_stack(),
        cap_bytes=None,
        record=record,
        device="cpu",
        timeout_s=timeout_s,
        server=server,
    )


def process_of(server: ForkServer) -> psutil.Process:
    assert server._process is not None
    return psutil.Process(server._process.pid)


def forks(server: ForkServer) -> list[psutil.Process]:
    return process_of(server).children()


@contextlib.contextmanager
def killing_a_fork(server: ForkServer) -> Iterator[None]:
    """Kill the next fork as soon as it is there."""

    def kill() -> None:
        wait_for(lambda: forks(server) != [], seconds=60)
        forks(server)[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()


# Probes ------------------------------------------------------------------------------------------


def test_a_probe_through_the_server_is_like_one_without(server: ForkServer, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"

    forked, alone = probe(server, record), probe(None)

    assert (forked.outcome, forked.detail) == (alone.outcome, alone.detail) == ("ok", None)
    for name in ("trainable", "tokens_per_step", "attention_backend"):
        assert getattr(forked, name) == getattr(alone, name) is not None
    # The quickest steps: whatever else runs on this machine disturbs some.
    quickest = min(alone.step_times_s)
    assert quickest / 5 < min(forked.step_times_s) < 5 * quickest
    # What a fork is for: it has its imports already.
    assert forked.startup_s is not None and alone.startup_s is not None
    assert forked.startup_s < alone.startup_s / 2
    assert read_records(record) == [forked]
    assert forks(server) == []


def test_a_killed_fork_is_told_and_the_next_one_works(server: ForkServer) -> None:
    with killing_a_fork(server):
        killed = probe(server)

    assert killed.outcome == "failed"
    assert killed.detail is not None and "killed by SIGKILL" in killed.detail
    assert probe(server).outcome == "ok"
    assert server.is_alive


@pytest.mark.parametrize("timeout_s", [0.0, 0.05])
def test_a_fork_that_takes_too_long_is_ended_and_the_next_one_works(
    server: ForkServer, timeout_s: float
) -> None:
    assert probe(server, timeout_s=timeout_s).outcome == "timed_out"

    assert forks(server) == []
    assert probe(server).outcome == "ok"


@pytest.mark.skipif(gpu_present(), reason="there is a GPU")
def test_without_a_device_there_is_no_context_to_tell_of(server: ForkServer) -> None:
    assert server.ask("context") is None
    assert server.is_alive


def test_probes_go_on_without_a_server_that_was_killed() -> None:
    with ForkServer(offline=True) as server:
        assert probe(server).outcome == "ok"
        process = process_of(server)
        process.kill()
        wait_for(lambda: is_gone(process))

        assert probe(server).outcome == "ok"
        assert not server.is_alive
        assert probe(server).outcome == "ok"


# Traces ------------------------------------------------------------------------------------------


def same(one: Trace, other: Trace) -> bool:
    """Compare all but the order of what is released at one instant, which chance decides."""
    events = [Counter((e.size, e.phase, e.layer) for e in trace.events) for trace in (one, other)]
    peaks = [numpy.maximum.accumulate(trace.sizes.cumsum())[-1] for trace in (one, other)]
    return (
        (events[0], peaks[0], one.work) == (events[1], peaks[1], other.work)
        and (one.owners, one.layer_of) == (other.owners, other.layer_of)
        and one.trainable == other.trainable
    )


def test_a_batch_is_traced_as_it_is_here_and_what_cannot_be_is_named(server: ForkServer) -> None:
    foreign = configure(trainer="unsloth", checkpointing="unsloth")
    configs = (configure(), foreign, configure(method="qlora", checkpointing="off"))
    architecture = figures(num_hidden_layers=2)

    made = server.trace(Batch(configs, architecture, "9.0"))

    assert made is not None and len(made) == 3
    lora, refused, qlora = made
    assert isinstance(refused, UntraceableError) and "another engine" in str(refused)
    assert isinstance(lora, Made) and isinstance(qlora, Made)
    for config, one in ((configs[0], lora), (configs[2], qlora)):
        assert same(one.trace, trace_all_layers(config, architecture, capability="9.0"))
        assert one.then is None
    assert not same(lora.trace, qlora.trace)


def test_what_is_made_of_a_trace_is_made_beside_the_others(server: ForkServer) -> None:
    configs, architecture = (configure(), configure(method="qlora")), figures(num_hidden_layers=2)
    replay = functools.partial(traced_memory, expandable=False, cap_bytes=GIB)

    made = server.trace(Batch(configs, architecture, "9.0", (replay, None)))

    assert made is not None
    lora, qlora = made
    assert isinstance(lora, Made) and isinstance(qlora, Made)
    assert lora.then == replay(lora.trace)
    assert qlora.then is None


def test_a_batch_whose_fork_is_killed_comes_to_nothing(server: ForkServer) -> None:
    batch = Batch((configure(), configure(method="qlora")), figures(), "9.0")

    with killing_a_fork(server):
        assert server.trace(batch) is None

    assert server.is_alive


# Its end -----------------------------------------------------------------------------------------


def test_a_closed_server_is_gone() -> None:
    server = ForkServer(offline=True)
    process = process_of(server)

    server.close()

    assert is_gone(process)
    assert server.start(Path("request"), Path("answer"), Path("log")) is None


def test_a_server_and_its_fork_end_with_a_parent_that_could_not_say_goodbye(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_forkserver import ForkServer, probe
with ForkServer(offline=True) as server:
    while True:
        probe(server)
"""
    parent = psutil.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})

    def family() -> list[psutil.Process]:
        return list(parent.children(recursive=True))

    wait_for(lambda: len(family()) == 2, seconds=120)
    server_and_fork = family()
    parent.send_signal(signal.SIGKILL)
    parent.wait(30)

    wait_for(lambda: all(is_gone(process) for process in server_and_fork), seconds=5)
