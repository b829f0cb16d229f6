"""How this process was started: alone, or as one of several that train together.

`torchrun` and `accelerate launch` say so in the environment (torch.distributed.run, "Environment
Variables"; accelerate/utils/launch.py). Nothing here imports torch: a process must be told which
card is its own before PyTorch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lora_advisor.probes import nvml
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UnavailableError, UsageError

#: What accelerate's configuration may ask for beside plain data parallelism, by the variable that
#: says so.
_OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One process of several on a host.

    Attributes:
        rank: Its number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return how this process was started.

    Raises:
        UsageError: In a way that cannot be trained in.
    """
    size = _number(environment, "WORLD_SIZE", 1)
    rank = _number(environment, "RANK", 0)
    for variable, name in _OTHER_WAYS.items():
        if environment.get(variable, "false").lower() == "true":
            raise UsageError(
                f"the launcher must run plain data parallelism (DDP), but its configuration asks "
                f"for {name}; start with `accelerate launch --multi_gpu` or torchrun, and plan for "
                "what one card holds."
            )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        raise UsageError(
            "the launcher must leave compilation to the plan, but its configuration asks for "
            f"{environment['ACCELERATE_DYNAMO_BACKEND']}; start with --dynamo_backend no."
        )
    local = _number(environment, "LOCAL_WORLD_SIZE", size)
    if local != size:
        raise UsageError(
            f"all processes must be on one host, but {local} of {size} are on this one; start them "
            "on one host."
        )
    return Launch(rank=rank, size=size)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else default


def take_own_card(launch: Launch) -> None:
    """Let this process see its own card alone, so that it is the first one for all that asks.

    A process that is the only one takes the first it sees.

    LOCAL_RANK numbers the cards that a process sees (accelerate/state.py, `set_device`), so it is 0
    then. NCCL finds the others' cards by their bus, seen or not (nccl/src/transport/p2p.cc).

    Raises:
        UnavailableError: There are fewer cards than processes.
    """
    if launch.size == 1:
        nvml.see_first_only()
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = (
        [str(number) for number in range(nvml.device_count())]
        if visible is None
        else [card.strip() for card in visible.split(",") if card.strip()]
    )
    if len(cards) < launch.size:
        raise UnavailableError(
            f"each process must have a card of its own, but there are {launch.size} processes and "
            f"{len(cards)} cards; start {max(1, len(cards))} of them."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = cards[launch.rank]
    os.environ["LOCAL_RANK"] = "0"


def forget_precision() -> None:
    """Leave the precision to the plan: accelerate's own would count where a plan has none."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def shared_config(config: RunConfig, *, planned_for: int, processes: int) -> RunConfig:
    """Return what each of several processes runs, so that a step has as many rows as planned.

    Args:
        config: The plan's, as each of `planned_for` processes would run it.
        planned_for: Processes of the plan.
        processes: How many there are.

    Raises:
        UsageError: They cannot share a step alike; it names how many can.
    """
    if processes > 1:
        config = config.replace(cuda_graph="off")  # DDP's hooks are not part of a graph
    micro_batches = config.accumulation * planned_for
    if micro_batches % processes == 0:
        return config.replace(accumulation=micro_batches // processes)
    rows = config.micro_batch * micro_batches
    able = [str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    some = f"{', '.join(able[:-1])} or {able[-1]}" if len(able) > 1 else able[0]
    again = (
        f", or plan again with --gpus {processes}"
        if rows % processes == 0
        else f", or plan again with --gpus {processes} and a --batch that {processes} divides"
    )
    raise UsageError(
        f"the processes must share the plan's step alike, but its {micro_batches} micro-batches of "
        f"{config.micro_batch} cannot be shared by {processes}; start {some}{again}."
    )
