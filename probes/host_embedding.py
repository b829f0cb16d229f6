"""Input embeddings held in host memory: their rows are looked up there and sent to the device.

A table of 152,064 rows of 3,584 numbers takes 1 GiB of a card, and a micro-batch reads a few
thousand rows of it. Where it is no head's weight as well, and not trained, the host can keep it. A
look-up waits for the device, which then waits for the rows, unless the host is told the tokens:
tokens x width x 2 bytes, 22 MB for 3,072 tokens of that model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.errors import UsageError

if TYPE_CHECKING:
    import torch

#: Called with each weight that leaves the device (`trace.py` notes it).
_told: list[Callable[[Any], None]] = []


@contextlib.contextmanager
def telling(note: Callable[[Any], None]) -> Iterator[None]:
    """Have `note` called with each weight that leaves the device meanwhile."""
    _told.append(note)
    try:
        yield
    finally:
        _told.remove(note)


def keep_on_host(model: Any) -> None:
    """Move a model's input embeddings to host memory, where `to` leaves them; to call once.

    Args:
        model: A causal language model of transformers.

    Raises:
        UsageError: The head has the same weight, or there are no such embeddings.
    """
    import torch

    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    weight = getattr(embeddings, "weight", None)
    if weight is None or (head is not None and head.weight is weight):
        raise UsageError(
            '`embedding` must be "device" for a model whose head has the weight of its input '
            "embeddings: the device needs it in any case."
        )

    class HostEmbedding(torch.nn.Module):
        """Looks up rows on the host; takes and returns tensors of the device."""

        def __init__(self) -> None:
            super().__init__()
            # Not registered, so that neither `to` nor a trainer moves it.
            object.__setattr__(self, "table", embeddings)

        @property
        def weight(self) -> torch.Tensor:
            return embeddings.weight  # type: ignore[no-any-return] # a module's own

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            known: torch.Tensor | None = vars(self).pop("known", None)
            if known is None:
                known = ids.to("cpu")
            return known.detach() if known.is_floating_point() else self.look_up(known, ids.device)

        def look_up(self, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
            """Return the rows of tokens in host memory, sent to a device."""
            rows: torch.Tensor = embeddings(ids)
            if device.type == "cuda":  # from other memory CUDA copies when all else is done
                rows = rows.pin_memory()
            return rows.to(device, non_blocking=True)

        @contextlib.contextmanager
        def told(self, ids: torch.Tensor) -> Iterator[None]:
            """Know the tokens of the next call meanwhile, and not ask the device for them.

            Args:
                ids: Those tokens, in host memory; or their rows, which are on the device already.
            """
            vars(self)["known"] = ids
            try:
                yield
            finally:
                vars(self).pop("known", None)

    embeddings.to("cpu")
    for note in _told:
        note(weight)
    embeddings.requires_grad_(False)
    model.set_input_embeddings(HostEmbedding())
