"""Run as one of several processes: trainings in turn, so that the imports are paid for once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lora_advisor.advisor.watch
from lora_advisor.advisor.launched import launched, shared_config
from lora_advisor.advisor.outcome import Progress
from lora_advisor.advisor.processes import joined
from lora_advisor.probes.config import RunConfig


def main() -> None:
    import tiny_training
    import torch

    torch.set_num_threads(1)
    lora_advisor.advisor.watch.REPORT_S = 0.0
    launch = launched()
    with joined(launch, "cpu"):
        for case in json.loads(Path(sys.argv[1]).read_text("utf-8")):
            config = RunConfig.from_json(case["config"])
            config = shared_config(config, planned_for=1, processes=launch.size)
            told: list[Progress] = []
            said: list[str] = []
            if launch.rank == case.get("too_small_in"):
                _let_memory_run_out(above=case["rows_that_fit"])
            tiny_training.run(
                config, Path(case["data"]), Path(case["output"]),
                progress=told.append, say=said.append, **case["changes"],
            )  # fmt: skip
            counts: dict[str, Any] = {"reports": len(told), "said": said}
            (Path(case["output"]) / f"rank-{launch.rank}").write_text(json.dumps(counts), "utf-8")


def _let_memory_run_out(*, above: int) -> None:
    """Have this process's device be too small for micro-batches above so many rows."""
    import torch
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaModel.forward

    def forward(model: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if model.training and len(input_ids) > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(model, input_ids=input_ids, **kwargs)

    modeling_llama.LlamaModel.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
