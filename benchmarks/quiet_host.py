"""Tell whether the cores of this host are left alone: times taken beside other work mean little.

    python benchmarks/quiet_host.py [--out FILE]

A fixed loop of plain Python runs on every core in turn, several times. On a virtual machine the
other thread of a core may be somebody else's: the loop then takes half as long again or twice as
long, and no counter of the machine says so. Names the cores on which no loop took over 1.2 times
the fastest, and ends with 1 where more than a fifth of all loops did.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from time import perf_counter

ROUNDS = 8
SLOW, TOLERATED = 1.2, 0.2


def loop_s() -> float:
    """Return the seconds of a fixed loop, some 20 ms: the fastest of two."""
    times = []
    for _ in range(2):
        began = perf_counter()
        total = 0
        for number in range(400_000):
            total += number * number
        times.append(perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    loops: dict[int, list[float]] = {core: [] for core in cores}
    for _ in range(ROUNDS):
        for core in cores:
            os.sched_setaffinity(0, {core})
            loops[core].append(round(loop_s() * 1000, 2))
    taken = [time for times in loops.values() for time in times]
    limit = SLOW * min(taken)
    slow = sum(time > limit for time in taken) / len(taken)
    found = {
        "fastest_ms": min(taken),
        "median_ms": statistics.median(taken),
        "slowest_ms": max(taken),
        "share_slow": round(slow, 3),
        "quiet": slow <= TOLERATED,
        "quiet_cores": [core for core, times in loops.items() if max(times) <= limit],
        "loops_ms": {str(core): times for core, times in loops.items()},
    }
    print(json.dumps(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    sys.exit(0 if found["quiet"] else 1)


if __name__ == "__main__":
    main()
