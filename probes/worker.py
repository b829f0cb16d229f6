"""The child process of a probe: `python -m lora_advisor.probes.worker REQUEST.json ANSWER.json`.

It builds the step of one configuration, runs it a few times on full rows (the worst case), and
writes what it measured. How the run ends is data in the answer; only a killed child writes none.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_advisor.probes import nvml
from lora_advisor.probes.errors import AdvisorError, UsageError
from lora_advisor.probes.exchange import Answer, Request
from lora_advisor.probes.meter import CudaMeter, Memory, Meter, open_meter
from lora_advisor.probes.stopwatch import Stopwatch

#: linux/prctl.h
_PR_SET_PDEATHSIG = 1

#: Words of errors that mean "no memory left": CUDA's, its libraries', the CPU allocator's.
_OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "outofmemoryerror",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "can't allocate memory",
)


def main(arguments: list[str]) -> int:
    """Answer a request; or print the context's bytes for `--context`."""
    if arguments == ["--context"]:
        die_with_parent(None)
        print(context_bytes())
        return 0
    if len(arguments) != 2:
        print(
            "usage: python -m lora_advisor.probes.worker REQUEST.json ANSWER.json", file=sys.stderr
        )
        return UsageError.exit_code
    return answer_file(Path(arguments[0]), Path(arguments[1]))


def answer_file(request_path: Path, answer_path: Path, parent_pid: int | None = None) -> int:
    """Read a request, run it, and write the answer.

    Args:
        request_path: The request.
        answer_path: Where the answer goes.
        parent_pid: The process to end with, where it is not the one that wrote the request.
    """
    request = Request.read(request_path)
    die_with_parent(parent_pid or request.parent_pid)
    set_environment(request)
    answer(request, output_dir=answer_path.parent / "trainer").write(answer_path)
    return 0


def die_with_parent(parent_pid: int | None) -> None:
    """Have the kernel end this process when its parent ends, however that happens (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        sys.exit(1)  # it was gone before the kernel was told


def set_environment(request: Request) -> None:
    """Set what PyTorch and the tokenizers read when they are imported."""
    # The name since PyTorch 2.9 (c10/core/AllocatorConfig.h); the old one would win over it.
    os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    os.environ.pop("PYTORCH_ALLOC_CONF", None)
    if request.config.allocator == "expandable_segments":
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    elif not request.config.is_buildable:  # which would have them expand where nothing is said
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    nvml.see_first_only()
    if request.architecture.weights is None:
        os.environ["HF_HUB_OFFLINE"] = "1"


def answer(request: Request, *, output_dir: Path) -> Answer:
    """Run a request to its end, whatever that is."""
    meters: list[Meter] = []
    try:
        return _measure(request, meters, output_dir)
    except Exception as error:
        traceback.print_exc()
        outcome = "out_of_memory" if is_out_of_memory(error) else "failed"
        return dataclasses.replace(_peaks(outcome, _last_memory(meters)), detail=first_line(error))


def _peaks(outcome: str, memory: Memory) -> Answer:
    return Answer(
        outcome=outcome,
        allocated_bytes=memory.allocated_bytes,
        reserved_bytes=memory.reserved_bytes,
        process_bytes=memory.process_bytes,
        context_bytes=memory.context_bytes,
        alloc_retries=memory.alloc_retries,
    )


def _measure(request: Request, meters: list[Meter], output_dir: Path) -> Answer:
    from lora_advisor.probes.weights import load_model, require_packages

    config = request.config
    require_packages(config, request.device)
    meter = open_meter(request.device, request.cap_bytes)
    meters.append(meter)
    startup: list[float] = []
    watch = Stopwatch(
        meter,
        warmup_steps=request.warmup_steps,
        measured_steps=request.measured_steps,
        max_seconds=request.max_seconds,
        on_first_step=lambda: startup.append(_age_s()),
    )
    model = load_model(config, request.architecture, request.device)
    held: list[Memory] = []
    trainer = _trainer(request, model, watch, lambda: held.append(meter.memory()), output_dir)
    model_bytes = meter.live_bytes()
    trainer.train()
    return dataclasses.replace(
        _timed(_peaks("ok", held[-1]), watch),
        model_bytes=model_bytes,
        startup_s=startup[0],
        tokens_per_step=config.tokens_per_step,
        attention_backend=_attention(request, watch.attention),
        sm_clock_max_mhz=meter.sm_clock_max_mhz(),
        trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    )


def _timed(answer: Answer, watch: Stopwatch) -> Answer:
    """Return an answer with what the stopwatch saw of the measured steps."""
    clocks = [c.sm_clock_mhz for c in watch.conditions if c.sm_clock_mhz is not None]
    degrees = [c.temperature_c for c in watch.conditions if c.temperature_c is not None]
    reasons = [c.throttled for c in watch.conditions if c.throttled is not None]
    return dataclasses.replace(
        answer,
        detail=_left_out(watch),
        step_times_s=watch.step_times_s,
        device_times_s=watch.device_times_s,
        host_times_s=watch.host_times_s,
        warmup_s=watch.warmup_s,
        joules=watch.joules,
        power_w=watch.power_w,
        energy_source=watch.energy_source,
        sm_clock_mhz=round(statistics.median(clocks)) if clocks else None,
        temperature_c=max(degrees, default=None),
        throttled=tuple(sorted(set().union(*reasons))) if reasons else None,
        unstable=watch.unstable,
    )


def _left_out(watch: Stopwatch) -> str | None:
    if not watch.left_out:
        return None
    steps = watch.left_out + len(watch.counted)
    return f"{watch.left_out} of {steps} measured steps compiled code and do not count"


def _trainer(
    request: Request, model: Any, watch: Stopwatch, ended: Callable[[], None], output_dir: Path
) -> Any:
    """Return the trainer of the configuration on full rows, the stopwatch attached.

    `ended` is called after the last step, while all is still there that a training holds.
    """
    from transformers import TrainerCallback

    from lora_advisor.probes.dataset import random_rows
    from lora_advisor.probes.finetune import Schedule, build_trainer, padding_tokenizer
    from lora_advisor.probes.preference import as_trained

    class Timer(TrainerCallback):
        """Tells the stopwatch of each step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Start the clocks."""
            watch.step_begins()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Stop the clocks, and the run when enough is measured."""
            if watch.step_ends():
                ended()
                control.should_training_stop = True

    config = request.config
    steps = watch.most_steps
    vocab_size = model.config.get_text_config().vocab_size
    # Packed rows hold several documents, which takes a mask.
    documents = 2 if config.packing else 1
    return build_trainer(
        config,
        model,
        rows=as_trained(
            config,
            random_rows(
                documents * steps * config.micro_batch * config.accumulation,
                config.seq_len // documents,
                vocab_size,
            ),
        ),
        tokenizer=padding_tokenizer(vocab_size),
        schedule=Schedule(max_steps=steps, output_dir=str(output_dir)),
        device=request.device,
        callbacks=[Timer()],
    )


def _attention(request: Request, seen: str | None) -> str | None:
    if seen is None and request.config.attention == "eager":
        seen = "eager"  # a compiled softmax has no name of its own
    if seen is None or request.device == "cuda":
        return seen
    return "cpu_eager" if seen == "eager" else "cpu_sdpa"


def _age_s() -> float:
    """Return the seconds since this process was started."""
    import psutil

    return time.time() - float(psutil.Process().create_time())


def _last_memory(meters: list[Meter]) -> Memory:
    """Return the peaks of a run that failed; a device in a failed state may no longer tell."""
    try:
        return meters[0].memory() if meters else Memory()
    except Exception:
        return Memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out."""
    return any(
        isinstance(link, MemoryError)
        or type(link).__name__ == "OutOfMemoryError"
        or any(word in str(link).lower() for word in _OUT_OF_MEMORY_WORDS)
        for link in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = link.__cause__ or link.__context__


def first_line(error: BaseException) -> str:
    """Return the sentence of one of our errors, or another's type and first line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, AdvisorError):
        return str(error)
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def context_bytes() -> int | None:
    """Return what a process holds on the GPU once it has multiplied two matrices."""
    nvml.see_first_only()
    meter = CudaMeter(None)
    import torch

    # cuBLAS and the first kernels load their code into the context when they are first used.
    tensor = torch.ones(256, 256, dtype=torch.bfloat16, device="cuda")
    (tensor @ tensor).float().sum().item()
    return meter.context_bytes()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
