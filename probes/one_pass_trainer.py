"""TRL's SFTTrainer whose micro-batches of padded rows do not wait for the device.

Between a micro-batch's first kernel and its last, TRL 1.16 reads about ten values back (profiled):
which tokens are trained, twice forward and twice backward, where a row's padding begins, and the
sums its metrics are made of. Each time the host waits until the device has done everything; then
the device waits for the host, which has nothing prepared. Here the collator, which has the labels
on the host, counts the trained tokens, so that their places are found without reading back;
embeddings in host memory are told the tokens; and the metrics are read when they are logged. Packed
rows still wait once where a mask keeps them apart, for transformers asks where each begins.

What is trained is the same: the same tokens, the same loss, the same gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any
from unittest import mock

import torch
from trl import SFTTrainer
from trl.trainer import utils

from lora_advisor.probes.one_pass_head import take_one_pass

#: Keys of a batch: how many of its tokens are trained, and its tokens as they are on the host.
SCORED, ON_HOST = "scored_tokens", "host_tokens"


@dataclass(frozen=True)
class HostTokens:
    """Tokens that stay on the host where a batch goes to the device, (rows, length)."""

    ids: torch.Tensor


class OnePassTrainer(SFTTrainer):  # type: ignore[misc] # TRL leaves its methods untyped
    """TRL's trainer, without waits inside a micro-batch, and with the loss of `one_pass_head`.

    Attributes:
        sizes: In how many sizes the trained tokens are counted; None to count them exactly.
    """

    sizes: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what SFTTrainer takes."""
        super().__init__(*args, **kwargs)
        collator: Any = vars(self)["data_collator"]
        self.data_collator = CountingCollator(collator, sizes=self.sizes)
        model: Any = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        take_one_pass(base)
        _find_tokens_by_count(base, exact=self.sizes is None)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return what TRL's method returns; its metrics stay on the device while it trains."""
        if not self.model.training:
            return super().compute_loss(*args, **kwargs)
        gather = self.accelerator.gather_for_metrics

        def later(value: torch.Tensor) -> Later:
            return Later(gather(value))

        with mock.patch.object(self.accelerator, "gather_for_metrics", later):
            return super().compute_loss(*args, **kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log what TRL logs; this is when metrics are read."""
        for kept in self._metrics.values():  # an evaluation's holds the trained tokens too
            for values in kept.values():
                values[:] = [float(value) for value in values]
        self._total_train_tokens = int(float(vars(self)["_total_train_tokens"]))
        super().log(*args, **kwargs)


class CountingCollator:
    """A collator whose batches say how many of their tokens are trained."""

    def __init__(
        self, collator: Callable[[Any], dict[str, Any]], *, sizes: int | None = None
    ) -> None:
        """Count for a collator whose batches have labels, (rows, length).

        Args:
            collator: The collator.
            sizes: Round up to so many parts of all tokens, one at least; None to count exactly.
        """
        self._collator, self._sizes = collator, sizes

    def __getattr__(self, name: str) -> Any:
        """Return what the collator itself has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._collator, name)

    def wrap(self, around: Callable[[Any], Callable[[Any], dict[str, Any]]]) -> None:
        """Put something around the collator that it counts for."""
        self._collator = around(self._collator)

    def __call__(self, rows: Any) -> dict[str, Any]:
        """Return the batch of some rows."""
        batch = self._collator(rows)
        scored = batch["labels"][:, 1:] != -100
        batch[SCORED] = int(scored.sum())
        if self._sizes is not None:
            part = -(-scored.numel() // self._sizes)
            parts = max(1, -(-batch[SCORED] // part))
            batch[SCORED] = min(scored.numel(), parts * part)
        batch[ON_HOST] = HostTokens(batch["input_ids"])
        return batch


class Later:
    """A number on the device that is read when somebody wants to know it, not before."""

    def __init__(self, value: torch.Tensor) -> None:
        """Stand for a tensor of one number, or for the several that `sum` and `mean` take."""
        self._value = value.detach()  # or the graph that made it would stay as long

    def sum(self) -> Later:
        """Return the sum of its parts."""
        return Later(self._value.sum())

    def mean(self) -> Later:
        """Return the mean of its parts."""
        return Later(self._value.mean())

    def item(self) -> Later:
        """Return itself: a number, but later."""
        return self

    def copy(self) -> Later:
        """Return the number as it is now: what it is read from may be written again."""
        return Later(self._value.clone())

    def __gt__(self, _: float) -> bool:
        """Answer yes, without looking: TRL asks before it divides, and what is over 0 is 0 here."""
        return True

    def __truediv__(self, other: Later | float) -> Later:
        """Return the ratio, 0 over a 0."""
        ratio = self._value / _raw(other)
        return Later(ratio.masked_fill(torch.as_tensor(_raw(other) == 0), 0.0))

    def __floordiv__(self, other: Later | float) -> Later:
        """Return the whole part of a ratio."""
        return Later(self._value // _raw(other))

    def __add__(self, other: Later | float) -> Later:
        """Return the sum of two."""
        return Later(self._value + _raw(other))

    __radd__ = __add__

    def __float__(self) -> float:
        """Return the number, which waits for the device."""
        return float(self._value)


def _raw(value: Any) -> Any:
    return value._value if isinstance(value, Later) else value


def _find_tokens_by_count(base: Any, *, exact: bool) -> None:
    """Have a model with TRL's fused loss find the trained tokens by their number, in training.

    TRL's forward pass is given the trained tokens' states alone, and their targets, and told not to
    look for any others. Where the number may be too large, the first token stands for those that
    are missing, and has no target.
    """
    theirs = base.forward

    @functools.wraps(getattr(theirs, "__func__", theirs))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        count, tokens = kwargs.pop(SCORED, None), kwargs.pop(ON_HOST, None)
        labels = kwargs.get("labels")
        if count is None or labels is None or not self.training or not kwargs.get("fused_lm_head"):
            return theirs(*args, **kwargs)
        following = labels[:, 1:].reshape(-1)
        scored = following != -100
        places = torch.nonzero_static(scored, size=count, fill_value=0).squeeze(-1)
        kwargs["labels"] = None
        targets = following.index_select(0, places)[None]
        if not exact:
            missing = torch.arange(count, device=scored.device) >= scored.sum()
            targets = targets.masked_fill(missing, -100)
        in_host_memory = getattr(self.get_input_embeddings(), "told", None)
        with contextlib.ExitStack() as stack:
            if in_host_memory is not None:
                stack.enter_context(in_host_memory(tokens.ids))
            stack.enter_context(_only(self.base_model, places))
            stack.enter_context(mock.patch.object(utils, "_use_triton", _no))
            return theirs(*args, shift_labels=targets, **kwargs)

    base.forward = MethodType(forward, base)


@contextlib.contextmanager
def _only(backbone: Any, places: torch.Tensor) -> Iterator[None]:
    """Have a backbone return the states at some places alone, (1, places, width).

    Args:
        backbone: Returns states of (rows, length, width).
        places: Among those of all tokens but each row's last, row by row.
    """

    def hook(_module: Any, _inputs: Any, outputs: Any) -> Any:
        states = outputs.last_hidden_state[:, :-1]
        flat = states.reshape(-1, states.shape[-1])
        outputs.last_hidden_state = flat.index_select(0, places.to(flat.device))[None]
        return outputs

    handle = backbone.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _no(_: Any) -> bool:
    """Answer whether TRL is to look for the trained tokens itself."""
    return False
