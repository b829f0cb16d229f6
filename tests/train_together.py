"""Run as one of several processes: trainings in turn, so that the imports are paid for once."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_advisor.advisor.watch
from lora_advisor.advisor.as_one_of import as_one_of
from lora_advisor.advisor.launched import Launch, shared_config
from lora_advisor.advisor.outcome import Progress
from lora_advisor.advisor.processes import joined
from lora_advisor.probes.config import RunConfig


def main(launch: Launch) -> int:
    import tiny_training
    import torch

    torch.set_num_threads(1)
    lora_advisor.advisor.watch.REPORT_S = 0.0
    with joined(launch, "cpu"):
        for case in json.loads(Path(sys.argv[1]).read_text("utf-8")):
            config = RunConfig.from_json(case["config"])
            config = shared_config(config, planned_for=1, processes=launch.size)
            told: list[Progress] = []
            said: list[str] = []
            small = launch.rank == case.get("too_small_in")
            with _little_memory(case["after"]) if small else contextlib.nullcontext():
                tiny_training.run(
                    config, Path(case["data"]), Path(case["output"]),
                    progress=told.append, say=said.append, **case["changes"],
                )  # fmt: skip
            counts: dict[str, Any] = {"reports": len(told), "said": said}
            (Path(case["output"]) / f"rank-{launch.rank}").write_text(json.dumps(counts), "utf-8")
    return 0


@contextlib.contextmanager
def _little_memory(after: int) -> Iterator[None]:
    """Have this process's device be too small for two rows, after so many forward passes."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaModel

    passes = itertools.count()
    plain: Any = LlamaModel.forward

    def forward(model: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if model.training and len(input_ids) > 1 and next(passes) >= after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(model, input_ids=input_ids, **kwargs)

    LlamaModel.forward = forward  # type: ignore[method-assign]
    yield
    LlamaModel.forward = plain  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(as_one_of(main))
