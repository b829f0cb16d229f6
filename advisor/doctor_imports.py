"""Import the heavy packages in a process of its own and tell what came of it.

An import that crashes or hangs is then a fact like any other, and what was learnt before stays.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from lora_advisor.probes import nvml

#: Importing torch and bitsandbytes takes 6 s on a quiet laptop and far longer from a cold disk.
IMPORT_LIMIT_S = 120.0

#: Marks the child's lines among whatever else the packages print.
_MARK = "lora-advisor-doctor "

# -P: a folder `models` or a file `torch.py` where the user stands must not be imported instead.
_CHILD = (
    sys.executable,
    "-P",
    "-c",
    "from lora_advisor.advisor.doctor_imports import report_imports; report_imports()",
)


@dataclass(frozen=True, kw_only=True)
class Imports:
    """What importing the heavy packages brought to light.

    Attributes:
        sections: Figures of "torch", "attention", "segments", "flash_attn" and "bitsandbytes", as
            far as it came, or {"error": first line}.
        failure: How the child ended when it did not end well: "was stopped after 120 s".
    """

    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failure: str | None = None


def try_imports(command: Sequence[str] = _CHILD, *, limit_s: float = IMPORT_LIMIT_S) -> Imports:
    """Run `report_imports` in a process of its own and read what it got to say."""
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as expired:
        return Imports(
            sections=_read_sections(expired.stdout or b""),
            failure=f"was stopped after {limit_s:g} s",
        )
    sections = _read_sections(child.stdout)
    if child.returncode == 0:
        return Imports(sections=sections)
    if child.returncode < 0:
        return Imports(sections=sections, failure=f"was ended by signal {-child.returncode}")
    lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
    reason = f": {lines[-1].rstrip('.')}" if lines else ""
    return Imports(sections=sections, failure=f"ended with code {child.returncode}{reason}")


def _read_sections(output: bytes) -> dict[str, Mapping[str, Any]]:
    sections: dict[str, Mapping[str, Any]] = {}
    for line in output.decode("utf-8", "replace").splitlines():
        if line.startswith(_MARK):
            sections.update(json.loads(line.removeprefix(_MARK)))
    return sections


def report_imports() -> None:
    """Import one heavy package after the other and print a line about each (in the child)."""
    looks: dict[str, Callable[[], dict[str, Any]]] = {
        "torch": _look_at_torch,
        "attention": _try_attention,
        "segments": _try_expandable_segments,
        "flash_attn": _look_at_flash_attn,
        "bitsandbytes": _look_at_bitsandbytes,
    }
    for name, look in looks.items():
        try:
            found = look()
        except Exception as error:  # any package may raise anything when it is imported
            lines = str(error).strip().splitlines()
            found = {"error": f"{type(error).__name__}: {lines[0]}" if lines else repr(error)}
        print(_MARK + json.dumps({name: found}), flush=True)


def _look_at_torch() -> dict[str, Any]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # torch says here why it cannot use a GPU
        is_available = torch.cuda.is_available()
    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "is_available": is_available,
        "warning": str(caught[-1].message).strip().splitlines()[0] if caught else None,
    }
    if torch.version.cuda is not None:
        found["driver_cuda"] = nvml.cuda_version()
    if is_available:
        found["device"] = torch.cuda.get_device_name()
        found["kernels"] = torch.cuda.get_arch_list()
    return found


def _try_attention() -> dict[str, Any]:
    """Run each fused backend of scaled_dot_product_attention, and ask which one torch takes."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    dtype = torch.bfloat16 if has_bf16 else torch.float16
    works: dict[str, Any] = {}
    for name, backend in backends.items():
        try:
            query = torch.randn(1, 2, 128, 64, device="cuda", dtype=dtype, requires_grad=True)
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # each says at length why it will not run
                output = scaled_dot_product_attention(query, query, query, is_causal=True)
                torch.autograd.backward(output.sum())
            torch.cuda.synchronize()
            works[name] = True
        except torch.OutOfMemoryError:
            works[name] = None  # a full card says nothing about the backend
        except RuntimeError:
            works[name] = False
    works["taken"] = _backend_taken(dtype)
    return works


def _backend_taken(dtype: Any) -> str | None:
    """Return the backend that torch chooses for causal rows of a model, as a training has them."""
    import torch
    from torch.nn.attention import SDPBackend

    try:
        query = torch.randn(1, 8, 1024, 128, device="cuda", dtype=dtype, requires_grad=True)
        chosen = torch._fused_sdp_choice(query, query, query, None, 0.0, True)
    except RuntimeError:  # a full card among them
        return None
    names = {
        SDPBackend.FLASH_ATTENTION: "flash",
        SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
        SDPBackend.CUDNN_ATTENTION: "cudnn",
        SDPBackend.MATH: "math",
    }
    return names.get(SDPBackend(chosen))


def _try_expandable_segments() -> dict[str, Any]:
    """Ask the allocator for expandable segments, and see whether it makes any."""
    import torch

    if not torch.cuda.is_available():
        return {}
    torch.cuda.empty_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not supported on this platform": seen below
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        held = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
        memory: Any = torch.cuda.memory  # untyped
        segments = memory.memory_snapshot()
        del held
    except torch.OutOfMemoryError:
        return {"works": None}
    known = [segment["is_expandable"] for segment in segments if "is_expandable" in segment]
    return {"works": any(known) if known else None}


def _look_at_flash_attn() -> dict[str, Any]:
    if find_spec("flash_attn") is None:
        return {}
    import flash_attn  # type: ignore[import-not-found, unused-ignore]

    return {"version": str(flash_attn.__version__)}


def _look_at_bitsandbytes() -> dict[str, Any]:
    import bitsandbytes
    from bitsandbytes import cextension

    library = cextension.lib
    return {
        "version": str(bitsandbytes.__version__),
        "library": type(library).__name__,
        "has_cuda": bool(getattr(type(library), "compiled_with_cuda", False)),
        "is_loaded": not type(library).__name__.startswith("ErrorHandlerMock"),
    }
