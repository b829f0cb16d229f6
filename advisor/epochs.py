"""What one pass over the user's data costs under each way to make micro-batches of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lora_advisor.advisor.lengths import Epoch, epoch_of, lengths_of, priced_lengths
from lora_advisor.probes.arguments import padding_multiple
from lora_advisor.probes.batching import BATCHINGS, Batching, with_batching
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.events import Work
from lora_advisor.probes.plan import DataSummary
from lora_advisor.probes.prediction import Interval

#: Seconds of one micro-batch of full rows, its share of the optimizer's work included, under a
#: configuration; None where they are not known, or where it does not fit.
MicroSeconds = Callable[[RunConfig], Interval | None]

#: Compiled layers know one length each time they are compiled (probes/compiled_layers.py). Where
#: they are packed, not padded to one, they run as they are after so many
#: (torch._dynamo.config.recompile_limit).
_COMPILED_LENGTHS = 8


def traced_lengths(longest: int) -> tuple[int, ...]:
    """Return the lengths from whose traces the work at any other follows, up to the longest."""
    return tuple(sorted({max(2, longest // part) for part in (4, 2, 1)}))


@dataclass(frozen=True)
class WorkByLength:
    """Work of a step at any sequence length, from that at three.

    The work of a kernel is a sum of 1, S and S^2 (probes/interpolate.py) as long as the step does
    the same things; where it does not, in short sequences above all, the host decides the time.

    Attributes:
        work_of: Returns the work of a configuration, from its trace.
        longest: The longest sequence that will be asked for.
    """

    work_of: Callable[[RunConfig], Work]
    longest: int
    _known: dict[RunConfig, dict[int, Work]] = field(default_factory=dict, repr=False)

    def __call__(self, config: RunConfig) -> Work:
        """Return the work of one optimizer step of a configuration."""
        import numpy

        like = config.replace(seq_len=self.longest)
        if like not in self._known:
            self._known[like] = {
                n: self.work_of(config.replace(seq_len=n)) for n in traced_lengths(self.longest)
            }
        known = self._known[like]
        powers = numpy.vander([*known, config.seq_len], len(known)) / float(self.longest)
        shares = numpy.linalg.solve(powers[:-1].T, powers[-1])
        parts = (work.times(float(n)) for n, work in zip(shares, known.values(), strict=True))
        return sum(parts, Work())


def data_report(
    summary: DataSummary,
    config: RunConfig,
    micro_seconds: MicroSeconds | None = None,
    *,
    seed: int = 0,
    names: Sequence[str] = BATCHINGS,
    packed_attention: str = "sdpa",
) -> tuple[Batching, ...]:
    """Return what a pass costs under each batching that the configuration's trainer knows.

    Args:
        summary: The data; without the lengths of its rows there is nothing to say.
        config: What is trained; its own batching is one of those reported.
        micro_seconds: Prices `config` with at most 12 other sequence lengths, as it is and with
            `packing`; layers that are compiled for too many lengths are priced as eager ones.
        seed: Of the order of the rows.
        names: Which of `BATCHINGS` are asked for.
        packed_attention: As `with_batching` takes it.
    """
    if not summary.length_counts:
        return ()
    epochs = _epochs(summary, config, seed, names, packed_attention)
    priced: list[Batching] = []
    for packed in (False, True):
        alike = [pair for pair in epochs if pair[0].packing == packed]
        if alike:  # the order of rows is nothing to the price of a micro-batch
            prices = _prices(alike, micro_seconds)
            priced += [_batching(epoch, prices) for _, epoch in alike]
    return tuple(priced)


def _epochs(
    summary: DataSummary,
    config: RunConfig,
    seed: int,
    names: Sequence[str],
    packed_attention: str,
) -> list[tuple[RunConfig, Epoch]]:
    """Return the passes that the configuration's trainer can make, with what makes them."""
    lengths = lengths_of(summary.length_counts, seed=seed)
    found = []
    for name in names:
        try:
            changed = with_batching(config, name, packed_attention=packed_attention)
        except UsageError:
            continue  # only TRL packs
        epoch = epoch_of(
            lengths,
            name,
            seq_len=config.seq_len,
            micro_batch=config.micro_batch,
            accumulation=config.accumulation,
            seed=seed,
            sequences=summary.sequences,
            useful_tokens=summary.tokens if summary.sequences > 1 else None,
            multiple=padding_multiple(changed) or 1,
        )
        found.append((changed, epoch))
    return found


def _prices(
    alike: Sequence[tuple[RunConfig, Epoch]], micro_seconds: MicroSeconds | None
) -> dict[int, Interval]:
    """Return the price of the lengths that are priced; nothing where one has none."""
    if micro_seconds is None:
        return {}
    config = alike[0][0].replace(group_by_length=False)
    lengths = {length for own, epoch in alike for length in _padded(own, epoch.lengths)}
    if config.compile == "layers" and len(lengths) > _COMPILED_LENGTHS:
        config = config.replace(compile="off")
    prices: dict[int, Interval] = {}
    for length in priced_lengths(lengths):
        price = micro_seconds(config.replace(seq_len=length))
        if price is None:
            return {}
        prices[length] = price
    return prices


def _padded(config: RunConfig, lengths: Sequence[float]) -> Iterator[float]:
    """Yield lengths as they are padded; the last micro-batch's, spread over more rows, likewise."""
    multiple = 1 if config.packing else padding_multiple(config) or 1  # those are filled already
    for length in lengths:
        yield math.ceil(length / multiple) * multiple if multiple > 1 else length


def _batching(epoch: Epoch, prices: dict[int, Interval]) -> Batching:
    def epoch_s(end: str) -> float:
        times: dict[int, float] = {n: getattr(price, end) for n, price in prices.items()}
        return epoch.epoch_s(lambda _, length: times[length], tuple(times))

    seconds = speed = None
    if prices:
        value, low, high = epoch_s("value"), epoch_s("low"), epoch_s("high")
        seconds = Interval(value=value, low=low, high=high)
        speed = seconds.reciprocal(epoch.useful_tokens)
    return Batching(
        name=epoch.batching,
        micro_batches=epoch.micro_batches,
        optimizer_steps=epoch.optimizer_steps,
        computed_tokens=epoch.computed_tokens,
        useful_tokens=epoch.useful_tokens,
        seconds=seconds,
        tokens_per_s=speed,
        rows=epoch.rows,
    )
