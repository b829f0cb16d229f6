"""Questions to the NVIDIA driver: unknown without one, in base units with one.

No GPU is needed. Where an answer is wanted, a stand-in for the module `pynvml` with two cards
answers, in the units of nvml.h, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.probes import nvml
from lora_advisor.probes.errors import UnavailableError, UsageError
from lora_advisor.probes.machine import cpu_machine, detect_machine, gpu_present

STAND_IN = """
from types import SimpleNamespace as Some

class NVMLError(Exception): pass

CARDS = ["GPU-aaaa-1111", "GPU-bbbb-2222"]
NVML_SUCCESS = 0
NVML_FI_DEV_POWER_INSTANT = 186
NVML_CLOCK_SM = 1
NVML_TEMPERATURE_GPU = 0
nvmlClocksEventReasonSwPowerCap = 4
nvmlClocksEventReasonGpuIdle = 1

def nvmlInit(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index):
    if index > 1: raise NVMLError("no such card")
    return index
def nvmlDeviceGetUUID(card): return CARDS[card]
def nvmlDeviceGetName(card): return f"card {card}"
def nvmlSystemGetDriverVersion(): return "580.1"
def nvmlDeviceGetCudaComputeCapability(card): return (8, 9)
def nvmlDeviceGetMemoryInfo(card): return Some(total=8 << 30, used=1 << 30, free=7 << 30)
def nvmlDeviceGetTotalEnergyConsumption(card): return 12500
def nvmlDeviceGetPowerUsage(card): return 99500
def nvmlDeviceGetEnforcedPowerLimit(card): return 115000
def nvmlDeviceGetFieldValues(card, fields):
    # As the driver answers: each field has a status of its own; card 1 lacks this one.
    return [Some(nvmlReturn=3 * card, value=Some(uiVal=101500)) for field in fields]
def nvmlDeviceGetClockInfo(card, kind): return 1980
def nvmlDeviceGetMaxClockInfo(card, kind): return 2370
def nvmlDeviceGetTemperature(card, sensor): raise NVMLError("not supported")
def nvmlDeviceGetCurrentClocksEventReasons(card): return 5
def nvmlDeviceGetComputeRunningProcesses(card):
    return [Some(pid=7, usedGpuMemory=100), Some(pid=8, usedGpuMemory=None),
            Some(pid=7, usedGpuMemory=20)]
"""

QUESTIONS = """
import dataclasses, json
from lora_advisor.probes import nvml
from lora_advisor.probes.machine import gpu_present
memory = nvml.memory()
others = nvml.other_processes(7)
print(json.dumps({
    "name": nvml.device_name(), "driver": nvml.driver(), "capability": nvml.capability(),
    "memory": memory and dataclasses.asdict(memory), "count": nvml.device_count(),
    "present": gpu_present(), "joules": nvml.energy_joules(), "watts": nvml.power_w(),
    "instant": nvml.instant_power_w(), "limit": nvml.power_limit_w(),
    "clock": nvml.sm_clock_mhz(), "highest": nvml.sm_clock_max_mhz(),
    "temperature": nvml.temperature_c(),
    "throttled": nvml.throttle_reasons(), "seven": nvml.process_bytes(7),
    "eight": nvml.process_bytes(8), "nine": nvml.process_bytes(9),
    "others": others and [process.pid for process in others],
}))
"""


def ask(folder: Path, visible: str | None) -> dict[str, Any]:
    """Return the stand-in's answers, with CUDA_VISIBLE_DEVICES as given."""
    (folder / "pynvml.py").write_text(STAND_IN, "utf-8")
    environment = {key: v for key, v in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run(
        [sys.executable, "-c", QUESTIONS], env=environment, capture_output=True, check=True
    )
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def test_without_a_visible_gpu_everything_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    questions = (
        nvml.device_name, nvml.driver, nvml.capability, nvml.memory, nvml.processes,
        nvml.energy_joules, nvml.power_w, nvml.instant_power_w, nvml.power_limit_w,
        nvml.sm_clock_mhz, nvml.sm_clock_max_mhz, nvml.temperature_c, nvml.throttle_reasons,
    )  # fmt: skip
    assert [question() for question in questions] == [None] * len(questions)
    assert nvml.process_bytes(os.getpid()) is None
    assert nvml.other_processes(os.getpid()) is None
    assert not gpu_present()


def test_answers_are_in_bytes_joules_and_watts(tmp_path: Path) -> None:
    answers = ask(tmp_path, None)
    assert answers["memory"] == {
        "total_bytes": 8589934592, "used_bytes": 1073741824, "free_bytes": 7516192768,
    }  # fmt: skip
    assert answers["joules"] == 12.5  # of 12,500 mJ
    assert answers["watts"] == 99.5  # of 99,500 mW
    assert answers["instant"] == 101.5
    assert answers["limit"] == 115.0
    assert answers["clock"] == 1980
    assert answers["highest"] == 2370
    assert answers["capability"] == "8.9"
    assert answers["driver"] == "580.1"


def test_a_field_the_card_lacks_is_unknown(tmp_path: Path) -> None:
    assert ask(tmp_path, None)["temperature"] is None  # the question fails
    assert ask(tmp_path, "1")["instant"] is None  # the question is answered, the field is not


def test_only_reasons_that_hold_the_clock_down_are_told(tmp_path: Path) -> None:
    assert ask(tmp_path, None)["throttled"] == ["power cap"]  # bits 1 (idle) and 4


def test_a_process_holds_the_sum_of_its_contexts_or_an_unknown_amount(tmp_path: Path) -> None:
    answers = ask(tmp_path, None)
    assert answers["seven"] == 120
    assert answers["eight"] is None
    assert answers["nine"] is None
    assert answers["others"] == [8]


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "card 0"),
        ("0", "card 0"),
        ("1", "card 1"),
        ("1,0", "card 1"),
        ("GPU-bbbb-2222", "card 1"),
        ("GPU-bb", "card 1"),
        ("GPU-cc", None),
        ("5", None),
        ("", None),
        ("-1", None),
    ],
)
def test_the_first_visible_card_is_asked(
    tmp_path: Path, visible: str | None, name: str | None
) -> None:
    answers = ask(tmp_path, visible)
    assert answers["name"] == name
    assert answers["present"] is (name is not None)


def test_a_gpu_asked_for_and_not_there_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(UnavailableError, match="needs an NVIDIA GPU, but the driver shows none"):
        detect_machine("cuda")


def test_the_cpu_is_a_machine() -> None:
    machine = detect_machine("cpu")
    assert machine == cpu_machine()
    assert (machine.kind, machine.driver, machine.capability) == ("cpu", None, None)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.memory_bytes == pytest.approx(pages, rel=0.01)


def test_another_device_is_refused() -> None:
    with pytest.raises(UsageError, match="`device` must be"):
        detect_machine("tpu")


def test_detecting_a_machine_imports_no_torch() -> None:
    code = (
        "import sys; from lora_advisor.probes.machine import detect_machine, gpu_present; "
        "gpu_present(); detect_machine('cpu'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
