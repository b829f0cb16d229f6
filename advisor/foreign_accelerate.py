"""Read an accelerate configuration: precision and compiling, laid over a whole configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_advisor.advisor.foreign import Imported, Reading
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError

_PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
#: Keys that say how a script is launched on one device.
_LAUNCH = (
    "compute_environment", "num_machines", "machine_rank", "gpu_ids", "use_cpu", "debug",
    "main_training_function", "downcast_bf16", "rdzv_backend", "same_network", "main_process_ip",
    "main_process_port", "enable_cpu_affinity", "tpu_use_cluster", "tpu_use_sudo", "tpu_env",
)  # fmt: skip


def read_accelerate(
    reading: Reading, marked: Mapping[str, Any], onto: RunConfig | None
) -> Imported:
    """Return the configuration `onto` with the file's precision and compiling.

    Raises:
        UsageError: There is none to lay it over, or a value is none that can be trained with.
    """
    if onto is None:
        raise UsageError(
            f"`{reading.where}` is of accelerate, which carries precision and compiling alone; "
            "give with --onto the plan or RunConfig that says the rest."
        )
    precision = str(reading.take("mixed_precision", "no")).lower()
    if precision not in _PRECISIONS:
        raise reading.wrong("mixed_precision", "no, bf16 or fp16", precision)
    dynamo = reading.take("dynamo_config") or {}
    if not isinstance(dynamo, Mapping):
        raise reading.wrong("dynamo_config", "a mapping", dynamo)
    compiled = str(dynamo.get("dynamo_backend", "NO")).upper() != "NO"
    regional = dynamo.get("dynamo_use_regional_compilation") is True
    kind = str(reading.take("distributed_type", "NO"))
    processes = reading.take("num_processes", 1)
    if kind != "NO" or processes != 1:
        reading.note("distributed_type", f"{kind}: one process on one device is what is answered.")
    if onto.cuda_graph != "off":
        reading.note("cuda_graph", "micro-batches are not recorded: that is lora-advisor's own.")
    config = onto.replace(
        cuda_graph="off",
        precision=_PRECISIONS[precision],
        compile=("layers" if regional else "model") if compiled else "off",
        quant_type=onto.quant_type,
        double_quant=onto.double_quant,
    )
    for key, value in reading.values.items():
        if key not in reading.seen and key not in _LAUNCH and value:
            reading.note(key, "not modelled; the answer is for a training without it.")
    ignored = tuple(key for key in reading.values if key in _LAUNCH)
    return Imported(source="accelerate", config=config, notes=tuple(reading.notes), ignored=ignored)
