from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.advisor.doctor import examine, to_json
from lora_advisor.advisor.doctor_facts import (
    Facts,
    Gpu,
    Place,
    cache_folder,
    gather,
    look_at,
    required_packages,
)
from lora_advisor.advisor.doctor_imports import Imports, try_imports
from lora_advisor.advisor.finding import Finding

CARD = Gpu(
    name="NVIDIA GeForce RTX 4060",
    memory_bytes=8 * 2**30,
    used_bytes=300 * 2**20,
    driver="580.65.06",
    capability="8.9",
    process_ids=(),
)
CUDA_TORCH: dict[str, Any] = {
    "version": "2.13.0+cu130",
    "cuda": "13.0",
    "hip": None,
    "is_available": True,
    "warning": None,
    "driver_cuda": "13.0",
    "device": "NVIDIA GeForce RTX 4060",
    "kernels": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}
CPU_TORCH: dict[str, Any] = {
    "version": "2.13.0+cpu",
    "cuda": None,
    "hip": None,
    "is_available": False,
    "warning": None,
}
CUDA_BNB = {"version": "0.50.2", "has_cuda": True, "is_loaded": True}
CPU_BNB = {"version": "0.50.2", "has_cuda": False, "is_loaded": True}
ROOM = Place(path="/home/me/work", free_bytes=100 * 2**30, is_writable=True)

HEALTHY = Facts(
    python="3.11.7",
    system="Linux 6.8.0, x86_64",
    is_wsl=False,
    gpu=CARD,
    versions={
        "torch": "2.13.0+cu130",
        "bitsandbytes": "0.50.2",
        "trl": "1.16.0",
        "liger-kernel": "0.8.5",
        "flash-attn": None,
        "pynvml": None,
    },
    requirements={"torch": ">=2.11", "bitsandbytes": ">=0.50", "trl": ">=1.16"},
    imports=Imports(
        sections={
            "torch": CUDA_TORCH,
            "attention": {
                "flash": True,
                "memory-efficient": True,
                "cudnn": False,
                "taken": "flash",
            },
            "segments": {"works": True},
            "flash_attn": {},
            "bitsandbytes": CUDA_BNB,
        }
    ),
    has_avx512_bf16=False,
    environment={},
    here=ROOM,
    cache=ROOM,
    own_cache=ROOM,
    ram_bytes=32 * 2**30,
    ram_free_bytes=20 * 2**30,
)


def look(name: str, facts: Facts) -> Finding:
    """Return the one finding of that name."""
    (found,) = [finding for finding in examine(facts) if finding.name == name]
    return found


def importing(**sections: Any) -> Facts:
    """Return the healthy machine with other results of importing."""
    merged = {**HEALTHY.imports.sections, **sections}
    return dataclasses.replace(HEALTHY, imports=Imports(sections=merged))


def with_versions(**versions: str | None) -> Facts:
    """Return the healthy machine with other packages; "_" stands for "-"."""
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    return dataclasses.replace(HEALTHY, versions={**HEALTHY.versions, **named})


def test_a_healthy_machine_has_nothing_but_ok() -> None:
    assert {finding.status for finding in examine(HEALTHY)} == {"ok"}


FULL = Place(path="/full", free_bytes=2**28, is_writable=True)
#: The ten usual breakages: the facts that show each, whose line says so, and what to do.
BREAKAGES: dict[str, tuple[Callable[[], Facts], str, str, str]] = {
    "driver too old": (
        lambda: importing(torch={**CUDA_TORCH, "driver_cuda": "12.4"}),
        "driver", "error", "update the driver to 580 or newer",
    ),
    "CPU-only torch": (lambda: importing(torch=CPU_TORCH), "torch", "error", "pip install torch"),
    "bitsandbytes without CUDA": (
        lambda: importing(bitsandbytes=CPU_BNB),
        "bitsandbytes", "error", "pip install -U bitsandbytes",
    ),
    "flash attention downgraded": (
        lambda: importing(attention={"flash": False, "memory-efficient": True,
                                     "taken": "memory-efficient"}),
        "attention", "warning", "install the torch build",
    ),
    "no fused attention taken": (
        lambda: importing(attention={"flash": True, "memory-efficient": True, "taken": "math"}),
        "attention", "warning", "install the torch build",
    ),
    "WSL spills": (
        lambda: dataclasses.replace(HEALTHY, is_wsl=True),
        "system", "warning", "spills to system memory",
    ),
    "another process": (
        lambda: dataclasses.replace(HEALTHY, gpu=dataclasses.replace(CARD, process_ids=(7,))),
        "gpu processes", "warning", "end them before a plan",
    ),
    "no space for checkpoints": (
        lambda: dataclasses.replace(HEALTHY, here=FULL), "disk", "warning", "another folder",
    ),
    "no space for models": (
        lambda: dataclasses.replace(HEALTHY, cache=FULL), "model cache", "warning", "HF_HOME",
    ),
    "no space for traces": (
        lambda: dataclasses.replace(HEALTHY, own_cache=FULL),
        "own cache", "warning", "LORA_ADVISOR_CACHE",
    ),
    "no Liger": (
        lambda: with_versions(liger_kernel=None),
        "liger-kernel", "warning", "pip install 'lora-advisor[gpu]'",
    ),
    "no trl": (lambda: with_versions(trl=None), "trl", "error", "pip install 'trl>=1.16'"),
    "unsupported compute capability": (
        lambda: dataclasses.replace(HEALTHY, gpu=dataclasses.replace(CARD, capability="6.1")),
        "torch", "error", "install a build that has",
    ),
    "no expandable segments": (
        lambda: importing(segments={"works": False}),
        "expandable segments", "warning", "--allocator default",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKAGES)
def test_each_usual_breakage_has_a_line_of_its_own_with_what_to_do(what: str) -> None:
    facts, name, status, advice = BREAKAGES[what]
    wrong = {f.name: f for f in examine(facts()) if f.status != "ok"}

    assert set(wrong) == {name}, "one cause, one line"
    assert wrong[name].status == status
    assert advice in str(wrong[name].advice)


@pytest.mark.parametrize(
    ("section", "status"),
    [
        ({"works": None}, "unknown"),
        ({"error": "RuntimeError: no driver"}, "warning"),
        ({}, "unknown"),
    ],
)
def test_segments_that_could_not_be_tried_are_not_called_broken(
    section: dict[str, Any], status: str
) -> None:
    assert look("expandable segments", importing(segments=section)).status == status


def test_an_older_cards_memory_efficient_attention_is_no_downgrade() -> None:
    works = {"flash": False, "memory-efficient": True, "taken": "memory-efficient"}
    facts = importing(attention=works)
    facts = dataclasses.replace(facts, gpu=dataclasses.replace(CARD, capability="7.5"))

    finding = look("attention", facts)

    assert (finding.status, finding.value) == (
        "ok", "sdpa with memory-efficient, takes memory-efficient",
    )  # fmt: skip


def test_no_two_findings_share_a_name() -> None:
    names = [finding.name for finding in examine(HEALTHY)]

    assert len(names) == len(set(names))


def test_a_machine_without_a_gpu_predicts_only_and_has_no_error() -> None:
    facts = dataclasses.replace(importing(torch=CPU_TORCH, bitsandbytes=CPU_BNB), gpu=None)

    finding = look("gpu", facts)

    assert (finding.status, finding.value) == ("unknown", "none")
    assert "Predictions only" in str(finding.advice)
    assert "error" not in {finding.status for finding in examine(facts)}


def test_a_cpu_torch_beside_a_gpu_is_an_error_with_the_mend() -> None:
    finding = look("torch", importing(torch=CPU_TORCH))

    assert finding.status == "error"
    assert "pip uninstall torch" in str(finding.advice)


def test_a_driver_too_old_for_torchs_cuda_is_an_error_that_names_the_branch() -> None:
    finding = look("driver", importing(torch={**CUDA_TORCH, "driver_cuda": "12.4"}))

    assert finding.status == "error"
    assert finding.value == "580.65.06, up to CUDA 12.4"
    assert "580 or newer, or install a torch built for CUDA 12" in str(finding.advice)


def test_a_driver_of_an_older_minor_version_is_enough() -> None:
    torch = {**CUDA_TORCH, "cuda": "13.2", "driver_cuda": "13.0"}

    assert look("driver", importing(torch=torch)).status == "ok"


def test_torch_that_sees_no_gpu_says_why() -> None:
    torch = {**CUDA_TORCH, "is_available": False, "warning": "CUDA unknown error"}

    finding = look("torch", importing(torch=torch))

    assert finding.status == "error"
    assert "CUDA unknown error" in str(finding.advice)


@pytest.mark.parametrize(
    ("capability", "kernels", "status"),
    [
        ("8.9", ["sm_86"], "ok"),  # binaries run on later minor versions
        ("8.6", ["sm_89"], "error"),
        ("6.1", ["sm_75", "sm_86"], "error"),
        ("9.0", ["sm_90a"], "ok"),
        ("10.0", ["sm_90a"], "error"),
        ("12.1", ["sm_90", "compute_120"], "ok"),  # PTX runs on everything later
        ("7.5", ["sm_75"], "warning"),  # no bf16
    ],
)
def test_kernels_are_compared_with_the_cards_capability(
    capability: str, kernels: list[str], status: str
) -> None:
    facts = importing(torch={**CUDA_TORCH, "kernels": kernels})
    facts = dataclasses.replace(facts, gpu=dataclasses.replace(CARD, capability=capability))

    assert look("torch", facts).status == status


def test_a_gpu_that_only_torch_sees_is_a_warning() -> None:
    finding = look("gpu", dataclasses.replace(HEALTHY, gpu=None))

    assert finding.status == "warning"
    assert "NVML" in str(finding.advice)


def test_bitsandbytes_with_its_cpu_library_beside_a_gpu_is_an_error() -> None:
    assert look("bitsandbytes", importing(bitsandbytes=CPU_BNB)).status == "error"


def test_bitsandbytes_without_any_library_is_an_error() -> None:
    section = {"version": "0.50.2", "has_cuda": False, "is_loaded": False}

    finding = look("bitsandbytes", importing(bitsandbytes=section))

    assert finding.status == "error"
    assert "native library missing" in finding.value


def test_the_repacking_cpu_is_mentioned_but_handled() -> None:
    facts = dataclasses.replace(
        importing(torch=CPU_TORCH, bitsandbytes=CPU_BNB), gpu=None, has_avx512_bf16=True
    )

    finding = look("bitsandbytes", facts)

    assert finding.status == "ok"
    assert "repacks 4-bit weights" in str(finding.advice)
    assert "lora-advisor switches that off" in str(finding.advice)


def test_an_import_that_raises_is_an_error_with_its_words() -> None:
    section = {"error": "OSError: libcudart.so.13: cannot open shared object file"}

    finding = look("bitsandbytes", importing(bitsandbytes=section))

    assert finding.status == "error"
    assert "libcudart.so.13" in str(finding.advice)


def test_an_import_that_ends_the_process_is_an_error_and_the_others_stay() -> None:
    sections = {key: HEALTHY.imports.sections[key] for key in ("torch", "attention", "flash_attn")}
    facts = dataclasses.replace(
        HEALTHY, imports=Imports(sections=sections, failure="was ended by signal 11")
    )

    finding = look("bitsandbytes", facts)

    assert finding.status == "error"
    assert "was ended by signal 11" in str(finding.advice)
    assert look("torch", facts).status == "ok"


def test_a_package_that_is_missing_or_too_old_is_an_error_with_the_command() -> None:
    missing = look("trl", with_versions(trl=None))
    old = look("torch", with_versions(torch="2.4.1"))

    assert (missing.status, missing.value) == ("error", "not installed")
    assert "pip install 'trl>=1.16'" in str(missing.advice)
    assert (old.status, old.value) == ("error", "2.4.1")
    assert "pip install 'torch>=2.11'" in str(old.advice)


def test_the_retired_pynvml_is_a_warning() -> None:
    assert look("pynvml", with_versions(pynvml="13.0.1")).status == "warning"


@pytest.mark.parametrize(
    ("works", "status", "value"),
    [
        ({"flash": True, "cudnn": True}, "ok", "sdpa with flash, cudnn"),
        ({"flash": False, "memory-efficient": False}, "warning", "sdpa without a fused backend"),
        ({"flash": None, "memory-efficient": None}, "unknown", "not tried"),
    ],
)
def test_attention_lists_the_backends_that_ran(
    works: dict[str, bool | None], status: str, value: str
) -> None:
    finding = look("attention", importing(attention=works))

    assert (finding.status, finding.value) == (status, value)


def test_a_flash_attn_that_cannot_be_imported_is_an_error() -> None:
    facts = importing(flash_attn={"error": "ImportError: undefined symbol"})
    facts = dataclasses.replace(facts, versions={**facts.versions, "flash-attn": "2.9.0"})

    assert look("flash-attn", facts).status == "error"


def test_liger_is_missed_on_a_gpu_only() -> None:
    facts = with_versions(liger_kernel=None)

    assert look("liger-kernel", facts).status == "warning"
    assert look("liger-kernel", dataclasses.replace(facts, gpu=None)).status == "ok"


def test_other_processes_on_the_gpu_are_a_warning_that_names_them() -> None:
    busy = dataclasses.replace(CARD, process_ids=(4242,), used_bytes=5 * 2**30)

    finding = look("gpu processes", dataclasses.replace(HEALTHY, gpu=busy))

    assert finding.status == "warning"
    assert finding.value == "1 (process 4242), 5.0 GiB in use"


def test_memory_that_nobody_listed_holds_is_a_warning() -> None:
    busy = dataclasses.replace(CARD, used_bytes=2 * 2**30)

    assert look("gpu processes", dataclasses.replace(HEALTHY, gpu=busy)).status == "warning"


def test_variables_that_change_results_are_named_with_their_effect() -> None:
    facts = dataclasses.replace(HEALTHY, environment={"CUDA_LAUNCH_BLOCKING": "1"})

    finding = look("environment", facts)

    assert finding.status == "warning"
    assert finding.value == "CUDA_LAUNCH_BLOCKING=1"
    assert "speeds are too low" in str(finding.advice)


def test_wsl_is_a_warning() -> None:
    finding = look("system", dataclasses.replace(HEALTHY, is_wsl=True))

    assert finding.status == "warning"
    assert "--reserve" in str(finding.advice)


def test_a_full_disk_warns_and_a_read_only_one_is_an_error() -> None:
    full = Place(path="/data", free_bytes=2**30, is_writable=True)
    locked = Place(path="/data", free_bytes=2**40, is_writable=False)

    assert look("disk", dataclasses.replace(HEALTHY, here=full)).status == "warning"
    assert look("model cache", dataclasses.replace(HEALTHY, cache=locked)).status == "error"


def test_little_host_memory_warns() -> None:
    assert look("memory", dataclasses.replace(HEALTHY, ram_free_bytes=2**30)).status == "warning"


def test_the_json_counts_errors_and_warnings() -> None:
    facts = dataclasses.replace(importing(torch=CPU_TORCH), is_wsl=True)

    document = json.loads(json.dumps(to_json(examine(facts))))

    assert (document["errors"], document["warnings"]) == (1, 1)
    assert document["findings"][0] == {
        "name": "python",
        "status": "ok",
        "value": "3.11.7",
        "advice": None,
    }


def test_a_child_that_crashes_keeps_what_it_had_said() -> None:
    code = """
import os
print('noise of some package')
print('lora-advisor-doctor {"torch": {"version": "1"}}', flush=True)
os.abort()
"""

    imports = try_imports((sys.executable, "-c", code))

    assert imports.sections == {"torch": {"version": "1"}}
    assert imports.failure == "was ended by signal 6"


def test_a_child_that_hangs_is_stopped() -> None:
    imports = try_imports((sys.executable, "-c", "import time; time.sleep(60)"), limit_s=0.5)

    assert imports == Imports(failure="was stopped after 0.5 s")


def test_a_child_that_fails_says_its_last_line() -> None:
    imports = try_imports((sys.executable, "-c", "raise SystemExit('no such module')"))

    assert imports.failure == "ended with code 1: no such module"


def test_the_cache_folder_follows_the_variables_of_the_hub() -> None:
    from huggingface_hub import constants

    assert cache_folder({"HF_HUB_CACHE": "/a"}) == Path("/a")
    assert cache_folder({"HF_HOME": "/b"}) == Path("/b/hub")
    assert cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert cache_folder({}).parts[-3:] == Path(constants.default_cache_path).parts[-3:]


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    place = look_at(tmp_path / "not" / "yet")

    assert place.is_writable
    assert place.free_bytes > 0


def test_the_required_packages_are_those_of_pyproject_without_extras() -> None:
    names = required_packages()

    assert {"torch", "trl", "bitsandbytes"} <= set(names)
    assert "pytest" not in names


def test_this_machine_is_examined_without_an_exception() -> None:
    facts = gather()
    findings = examine(facts)

    assert facts.imports.failure is None
    assert set(facts.imports.sections) == {
        "torch", "attention", "segments", "flash_attn", "bitsandbytes",
    }  # fmt: skip
    # The wheel of PyPI is called 2.13.0 and says 2.13.0+cu130 of itself.
    assert str(facts.imports.sections["torch"]["version"]).startswith(
        str(facts.versions["torch"]).split("+")[0]
    )
    assert json.loads(json.dumps(to_json(findings)))["errors"] == sum(
        finding.status == "error" for finding in findings
    )


@pytest.mark.gpu
def test_on_a_gpu_some_fused_attention_runs() -> None:
    facts = gather()

    assert facts.gpu is not None
    assert any(facts.imports.sections["attention"].values())
    assert facts.imports.sections["torch"]["driver_cuda"]
