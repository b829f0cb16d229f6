"""Packed micro-batches of few lengths, and of few numbers of documents.

TRL lays the packed rows of a micro-batch end to end and says where each document begins
(`DataCollatorForLanguageModeling`, padding_free). So every micro-batch has a length of its own, and
as many documents as happen to be in it; but compiled layers and CUDA graphs are for one shape each.
Here micro-batches are filled up to a multiple of a length, and the list of bounds with documents of
no length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: Documents of a sequence that there is room for in any case. The kernel's backward pass takes
#: 128 rows of fp32 sums more for each (flash_api.cpp, `mha_varlen_bwd`), so that memory is the same
#: whether a probe's rows hold two documents or a training's hold eight; more of them take more.
DOCUMENTS = 8


class FilledUp:
    """A collator of packed rows whose micro-batches have few lengths."""

    def __init__(
        self, collator: Callable[[Any], dict[str, Any]], *, seq_len: int, multiple: int
    ) -> None:
        """Fill up what TRL's collator makes of rows that have `seq_lengths`.

        Args:
            collator: TRL's.
            seq_len: Tokens that a packed row is filled to; no document is longer.
            multiple: What the length of a micro-batch is filled up to a multiple of.
        """
        self._collator, self._seq_len, self._multiple = collator, seq_len, multiple

    def __getattr__(self, name: str) -> Any:
        """Return what the collator itself has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._collator, name)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the micro-batch of some rows, its tokens (1, length)."""
        batch = self._collator(rows)
        if "seq_lengths" in rows[0]:  # those of an evaluation are not packed
            batch = self._filled(batch)
        batch["max_length_q"] = batch["max_length_k"] = self._seq_len
        return batch

    def _filled(self, batch: dict[str, Any]) -> dict[str, Any]:
        tokens = batch["input_ids"].shape[1]
        missing = -tokens % self._multiple
        full = tokens + missing
        inner = torch.arange(tokens, full, self._seq_len)[1:]
        ends = torch.tensor([full] if missing else [])
        bounds = torch.cat([batch["cu_seq_lens_q"], inner.int(), ends.int()])
        room = max(bounds.numel() - 1, DOCUMENTS * -(-full // self._seq_len))
        room = 1 << (room - 1).bit_length()
        bounds = torch.cat([bounds, bounds.new_full((room + 1 - bounds.numel(),), full)])
        nothing = torch.zeros(missing)
        filling = {
            "input_ids": nothing + self._collator.pad_token_id,  # type: ignore[attr-defined]
            "labels": nothing - 100,
            "position_ids": torch.arange(missing) % self._seq_len,
            "seq_idx": nothing - 1,
        }
        filled = {
            name: torch.cat([batch[name], more[None].to(batch[name].dtype)], dim=1)
            for name, more in filling.items()
        }
        # TRL counts tokens by the mask; without one it copies a number to the device, which cannot
        # be recorded as a CUDA graph. No layer sees it (probes/padding_mask.py).
        mask = (torch.arange(full) < tokens).long()[None]
        bounds_of_both = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return {**batch, **filled, **bounds_of_both, "attention_mask": mask}


def fill_up(trainer: Any, seq_len: int, multiple: int) -> None:
    """Have a trainer of TRL's fill up its packed micro-batches, as `FilledUp`."""

    def filling(collator: Any) -> FilledUp:
        return FilledUp(collator, seq_len=seq_len, multiple=multiple)

    collator = vars(trainer)["data_collator"]
    if hasattr(collator, "wrap"):  # what counts trained tokens counts in filled ones
        collator.wrap(filling)
    else:
        vars(trainer)["data_collator"] = filling(collator)


def useful_tokens(inputs: Mapping[str, Any]) -> Any:
    """Return a micro-batch's tokens that are no padding, as a number or a tensor of one.

    A sum stays where the mask is until somebody reads it: to read it at once would wait for the
    device in every micro-batch.
    """
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else mask.sum()
