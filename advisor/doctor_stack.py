"""What the doctor makes of the packages: their versions and what importing them showed."""

from __future__ import annotations

from collections.abc import Iterator

from lora_advisor.advisor.doctor_facts import Facts
from lora_advisor.advisor.finding import Finding, say
from lora_advisor.probes import unsloth

#: Judged by what importing them shows, not by their version alone.
_IMPORTED = ("torch", "bitsandbytes")


def judge_torch(facts: Facts) -> Finding:
    """Whether torch can use the GPU that is there."""
    bad = _not_usable("torch", facts, "Nothing but --help works without it.")
    if bad is not None:
        return bad
    torch, gpu = facts.imports.sections["torch"], facts.gpu
    cuda = torch.get("cuda")
    value = f"{torch['version']}, {f'CUDA {cuda}' if cuda else 'CPU only'}"
    if gpu is None or torch.get("hip"):
        return say("torch", "ok", value)
    if cuda is None:
        advice = (
            "This torch cannot use the GPU: `pip uninstall torch`, then install a build with CUDA. "
            "On Linux `pip install torch` brings one; https://pytorch.org/get-started/locally/ "
            "lists the others."
        )
        return say("torch", "error", value, advice)
    if not torch.get("is_available"):
        reason = torch.get("warning") or "it gives no reason"
        advice = (
            f"torch does not see the GPU that the driver lists ({reason}); see the driver's line."
        )
        return say("torch", "error", value, advice)
    if gpu.capability is None or not torch.get("kernels"):
        return say("torch", "ok", value)
    major, minor = (int(part) for part in gpu.capability.split("."))
    if not any(_runs_on(kernel, major, minor) for kernel in torch["kernels"]):
        advice = (
            f"This torch has no kernels for compute capability {gpu.capability}, only for "
            f"{', '.join(torch['kernels'])}: install a build that has."
        )
        return say("torch", "error", value, advice)
    if major < 8:
        advice = (
            f"Compute capability {gpu.capability} has no bf16: plans use fp16, whose training can "
            "overflow."
        )
        return say("torch", "warning", value, advice)
    return say("torch", "ok", value)


def _runs_on(kernel: str, major: int, minor: int) -> bool:
    """Whether "sm_86" (binary, for its major version) or "compute_90" (PTX, upwards) serves."""
    kind, _, number = kernel.partition("_")
    digits = number.rstrip("af")
    if not digits.isdigit() or len(digits) < 2:
        return False
    built_for = (int(digits[:-1]), int(digits[-1]))
    if number.endswith("a"):  # sm_90a: for that one only
        return built_for == (major, minor)
    if kind == "compute":
        return built_for <= (major, minor)
    return built_for[0] == major and built_for[1] <= minor


def judge_bitsandbytes(facts: Facts) -> Finding:
    """Whether 4-bit weights and 8-bit optimizers work on the device that is there."""
    need = "QLoRA and the 8-bit optimizers need it."
    bad = _not_usable("bitsandbytes", facts, need)
    if bad is not None:
        return bad
    section = facts.imports.sections["bitsandbytes"]
    version = str(section["version"])
    if not section["is_loaded"]:
        advice = f"{need} `python -m bitsandbytes` says which library it looks for."
        return say("bitsandbytes", "error", f"{version}, native library missing", advice)
    if section["has_cuda"]:
        return say("bitsandbytes", "ok", f"{version}, CUDA library")
    if facts.gpu is not None:
        advice = (
            f"{need} Mend torch's line first if it is wrong, for bitsandbytes takes the library of "
            "the CUDA that torch reports; else take a bitsandbytes that has it: pip install -U "
            "bitsandbytes."
        )
        return say("bitsandbytes", "error", f"{version}, CPU library only", advice)
    advice = (
        "On this CPU (AVX512-BF16) its first evaluation repacks 4-bit weights, and gradients are "
        "wrong from then on. lora-advisor switches that off; scripts of your own must too."
    )
    return say(
        "bitsandbytes",
        "ok",
        f"{version}, CPU library",
        advice if facts.has_avx512_bf16 else None,
    )


def judge_packages(facts: Facts) -> Iterator[Finding]:
    """Compare the versions of the other packages with what this project needs."""
    for name in facts.requirements:
        if name not in _IMPORTED:
            yield _wrong_version(name, facts) or say(name, "ok", str(facts.versions[name]))
    version = facts.versions.get("pynvml")
    if version is not None:
        advice = (
            "This retired package gets in the way of nvidia-ml-py: `pip uninstall pynvml`, then "
            "`pip install --force-reinstall nvidia-ml-py`."
        )
        yield say("pynvml", "warning", version, advice)


def _wrong_version(name: str, facts: Facts) -> Finding | None:
    from packaging.specifiers import SpecifierSet

    version, wanted = facts.versions.get(name), facts.requirements.get(name, "")
    if version is None:
        return say(name, "error", "not installed", f"Install it: pip install '{name}{wanted}'.")
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return None
    advice = f"It must be {wanted}: pip install '{name}{wanted}'."
    return say(name, "error", version, advice)


def _not_usable(name: str, facts: Facts, need: str) -> Finding | None:
    """Say why a package cannot be used: missing, too old, its own error, or its process died."""
    wrong = _wrong_version(name, facts)
    section = facts.imports.sections.get(name)
    if wrong is not None or (section is not None and "error" not in section):
        return wrong
    error = _child_end(facts) if section is None else f"{section['error']}."
    advice = f"{error} {need} Reinstall it: pip install --force-reinstall {name}."
    return say(name, "error", f"{facts.versions[name]}, cannot be imported", advice)


def _child_end(facts: Facts) -> str:
    return f"The process that imports the packages {facts.imports.failure or 'said nothing'}."


def judge_attention(facts: Facts) -> Finding:
    """Which fused backends of scaled_dot_product_attention run on this GPU."""
    works = facts.imports.sections.get("attention")
    if works is None:
        return say("attention", "unknown", "not tried", _child_end(facts))
    if "error" in works:
        return say("attention", "error", str(works["error"]))
    if not works:
        return say("attention", "unknown", "not tried without a GPU")
    taken = works.get("taken")
    tried = {name: runs for name, runs in works.items() if name != "taken"}
    running = [name for name, runs in tried.items() if runs]
    if running:
        return _downgraded(facts, str(taken), running) or say(
            "attention",
            "ok",
            f"sdpa with {', '.join(running)}" + (f", takes {taken}" * bool(taken)),
        )
    if None in tried.values():
        advice = "The card has no memory left to try it: end what fills it."
        return say("attention", "unknown", "not tried", advice)
    advice = "Memory grows with the square of the sequence's length: plan short sequences."
    return say("attention", "warning", "sdpa without a fused backend", advice)


def _downgraded(facts: Facts, taken: str, running: list[str]) -> Finding | None:
    """Say that torch takes a slower kernel than the card has; None where it does not."""
    gpu = facts.gpu
    has_flash = gpu is not None and gpu.capability is not None and int(gpu.capability[:-2]) >= 8
    if taken == "math":
        advice = (
            "torch computes attention without a fused kernel although one runs: install the torch "
            "build that https://pytorch.org/get-started/locally/ names for this driver, or plan "
            "short sequences."
        )
        return say("attention", "warning", f"sdpa takes math of {', '.join(running)}", advice)
    if has_flash and "flash" not in running and taken == "memory-efficient":
        advice = (
            "This card has a flash kernel, but this torch does not run it, so attention is slower: "
            "install the torch build that https://pytorch.org/get-started/locally/ names."
        )
        return say("attention", "warning", "sdpa takes memory-efficient, no flash", advice)
    return None


def judge_segments(facts: Facts) -> Finding:
    """Whether the allocator's expandable segments, which plans may ask for, work here."""
    found = facts.imports.sections.get("segments")
    if found is None:
        return say("expandable segments", "unknown", "not tried", _child_end(facts))
    if not found and facts.gpu is None:
        return say("expandable segments", "unknown", "not tried without a GPU")
    if found.get("works") is True:
        return say("expandable segments", "ok", "work")
    if found.get("works") is None and "error" not in found:
        advice = "A full card, or a torch that lists none: a plan's own probes will show it."
        return say("expandable segments", "unknown", "not tried", advice)
    value = str(found.get("error", "this driver or platform makes none"))
    advice = "Give `--allocator default` to plan and fit: with them memory would be told too low."
    return say("expandable segments", "warning", value, advice)


def judge_flash_attn(facts: Facts) -> Finding:
    """Whether the optional flash-attn package can be imported."""
    version = facts.versions.get("flash-attn")
    section = facts.imports.sections.get("flash_attn", {})
    if version is None:
        advice = 'Only attention "flash_attention_2" needs it; sdpa has a flash backend of its own.'
        return say("flash-attn", "ok", "not installed", advice)
    if "error" in section:
        advice = (
            "It was built for another torch: rebuild it, or uninstall it and use sdpa, whose flash "
            "backend is the same algorithm."
        )
        return say("flash-attn", "error", f"{version}: {section['error']}", advice)
    return say("flash-attn", "ok", version)


def judge_unsloth(facts: Facts) -> Finding:
    """Whether the optional other engine is there, and its folder is what it should be."""
    if facts.unsloth is not None:
        return say("unsloth", "ok", facts.unsloth)
    if facts.unsloth_folder is None:
        advice = "Plans try it where it is: make unsloth, or see requirements-unsloth.txt."
        return say("unsloth", "ok", "not installed", None if facts.gpu is None else advice)
    advice = (
        f"{unsloth.FOLDER} names {facts.unsloth_folder}, which lacks it; see "
        "requirements-unsloth.txt, or leave the variable out."
    )
    return say("unsloth", "warning", "not there", advice)


def judge_liger(facts: Facts) -> Finding:
    """Whether the optional Liger kernels are there."""
    version = facts.versions.get("liger-kernel")
    if version is not None:
        return say("liger-kernel", "ok", version)
    if facts.gpu is None:
        return say("liger-kernel", "ok", "not installed", "Its kernels run on a GPU only.")
    advice = "Its kernels save memory and time on a GPU: pip install 'lora-advisor[gpu]'."
    return say("liger-kernel", "warning", "not installed", advice)
