"""Memory that a driver moves to the host instead of refusing it: such a run is no fit.

Under Windows and WSL the driver gives a process shared host memory once the card is full. Nothing
fails; a step takes ten times as long and more (resident memory was read at 178 GB/s and spilled
memory at 6.7 GB/s by willitfit 0.0.3; bmaltais/kohya_ss issue 961 saw 295 s an iteration).
"""

from __future__ import annotations

import dataclasses

from lora_advisor.probes.prediction import Interval
from lora_advisor.probes.record import ProbeResult

#: Share of the card's memory above which a process may have been given host memory.
_FULL = 0.9
#: A step this many times slower than the upper end of what was expected has fallen off the cliff.
_CLIFF = 4.0


def without_spills(result: ProbeResult, expected_step_s: Interval | None) -> ProbeResult:
    """Return a probe's result, a run that spilled counted as one that did not fit.

    Args:
        result: What was measured.
        expected_step_s: Seconds of a step as expected before; None if nothing was.
    """
    if (
        result.outcome != "ok"
        or result.machine.kind != "cuda"
        or expected_step_s is None
        or result.step_s is None
        or result.process_bytes is None
        or result.process_bytes < _FULL * result.machine.memory_bytes
        or result.step_s < _CLIFF * expected_step_s.high
    ):
        return result
    return dataclasses.replace(
        result,
        outcome="out_of_memory",
        detail=(
            f"a step took {result.step_s:.1f} s where at most {expected_step_s.high:.1f} s was "
            "expected on a full card: the driver moves memory to the host (WDDM, WSL)"
        ),
    )
