"""What the batches of an evaluation come to: the loss of each row, or the rewards of each pair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.likelihood import RowLosses
from lora_advisor.advisor.preference_loss import PairRewards
from lora_advisor.probes.tokens import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

#: Positions whose log-likelihoods are computed at once: 100 MB in fp32 for 200,000 words.
_POSITIONS = 128


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Losses of rows, or of pairs, under a model.

    Attributes:
        loss: Mean negative log-likelihood of a trained token, in nats: every token weighs the same;
            of pairs the mean DPO loss, every pair weighing the same.
        rows: What each row or pair came to, in their order.
    """

    loss: float
    rows: RowLosses | PairRewards


class RowsSeen:
    """What the batches of an evaluation of rows come to."""

    found = ("_loss", "_sums", "_counts")

    def __init__(self) -> None:
        """Begin with nothing."""
        self._loss = 0.0
        self._sums: list[float] = []
        self._counts: list[int] = []

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Hear nothing but the batches."""
        return contextlib.nullcontext()

    def take(self, loss: float, outputs: Any, inputs: dict[str, Any]) -> None:
        """Take a batch: its loss, what the model said, and what it was asked."""
        sums, counts = _row_sums(outputs, inputs)
        # The trainers weigh every batch the same, whatever it holds; so the tokens are counted.
        self._loss += loss * sum(counts)
        self._sums.extend(sums)
        self._counts.extend(counts)

    def evaluation(self, order: Sequence[int]) -> Evaluation:
        """Return what came of all batches; `order` are the rows' numbers as they were taken."""
        nats, tokens = [0.0] * len(order), [0] * len(order)
        for row, total, count in zip(order, self._sums, self._counts, strict=True):
            nats[row], tokens[row] = total / count, count
        return Evaluation(
            loss=self._loss / sum(self._counts),
            rows=RowLosses(nats=tuple(nats), tokens=tuple(tokens)),
        )


class PairsSeen:
    """What the batches of an evaluation of pairs come to.

    TRL's step asks the model twice: as it is, then as the reference, without its adapter.
    """

    found = ("_rewards",)

    def __init__(self, trainer: Any) -> None:
        """Take TRL's trainer."""
        self._model, self._beta = trainer.model, float(trainer.beta)
        self._asked: list[Any] = []
        self._rewards: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what the model answers."""
        hook = self._model.register_forward_hook(lambda *at: self._asked.append(at[-1].log_probs))
        try:
            yield
        finally:
            hook.remove()

    def take(self, _: float, outputs: Any, __: dict[str, Any]) -> None:
        """Take a batch: what the model said, as it is."""
        # Log-likelihoods of the answers' tokens, 0 elsewhere; all chosen ones first.
        ratios = (outputs.log_probs - self._asked[-1]).double().sum(dim=1) * self._beta
        self._asked.clear()
        chosen, rejected = ratios.chunk(2)
        self._rewards += zip(chosen.tolist(), rejected.tolist(), strict=True)

    def evaluation(self, order: Sequence[int]) -> Evaluation:
        """Return what came of all batches; `order` are the rows' numbers as they were taken."""
        in_order = dict(zip(order, self._rewards, strict=True))
        chosen, rejected = zip(*(in_order[row] for row in sorted(in_order)), strict=True)
        rewards = PairRewards(chosen=chosen, rejected=rejected, beta=self._beta)
        return Evaluation(loss=rewards.loss, rows=rewards)


def _row_sums(outputs: Any, inputs: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Return, for each row of a batch, its negative log-likelihood and its trained tokens."""
    import torch

    labels = inputs["labels"][:, 1:]
    # TRL's fused loss gives the log-likelihoods themselves, and no logits.
    known = getattr(outputs, "log_probs", None)
    losses = _token_losses(outputs.logits, labels) if known is None else -known.float()
    trained = (labels != IGNORED).to(losses.device)
    places = inputs.get("position_ids")
    if places is None:
        row = torch.arange(len(labels), device=losses.device)[:, None].expand_as(labels)
    else:  # rows without padding between them: each begins at place 0
        row = (places == 0).to(losses.device).long().flatten().cumsum(0).view_as(places)[:, 1:] - 1
    size = int(row.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64, device=losses.device)
    counts = torch.zeros(size, dtype=torch.long, device=losses.device)
    sums.index_add_(0, row[trained], losses[trained].double())
    counts.index_add_(0, row[trained], torch.ones_like(row[trained]))
    # Padding at the end of such a batch looks like rows of its own, but trains nothing.
    pairs = [(s, n) for s, n in zip(sums.tolist(), counts.tolist(), strict=True) if n]
    return [s for s, _ in pairs], [n for _, n in pairs]


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each label; 0 where it is ignored."""
    import torch
    from torch.nn.functional import cross_entropy

    labels = labels.to(logits.device)
    losses = torch.zeros(labels.shape, device=logits.device)
    wanted = (labels != IGNORED).nonzero()
    for start in range(0, len(wanted), _POSITIONS):
        rows, places = wanted[start : start + _POSITIONS].unbind(1)
        losses[rows, places] = cross_entropy(
            logits[rows, places].float(), labels[rows, places], reduction="none"
        )
    return losses
