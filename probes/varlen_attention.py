"""Attention within each document of packed rows, by FlashAttention's kernel in PyTorch itself.

A packed micro-batch is one long sequence of documents. With `scaled_dot_product_attention` it takes
a mask of length x length to keep them apart, which no flash kernel knows: memory and time grow with
the square of all tokens of a micro-batch. The kernel for rows of several lengths takes their bounds
instead (`aten::_flash_attention_forward`; its public form is torch.nn.attention.varlen, whose
arguments differ between 2.11 and 2.13). Nothing needs to be installed for it.

Where rows are not packed (evaluation, generation) attention is that of "sdpa".
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from lora_advisor.probes.errors import UnavailableError
from lora_advisor.probes.padding_mask import leave_out_padding_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: As a configuration calls it, and as transformers knows it.
NAME = "varlen"

#: Set while a step is traced: the CPU of its fake tensors stands for a GPU.
stands_for_cuda = False


def use_bounds(model: PreTrainedModel) -> None:
    """Have a model attend to packed rows by their bounds."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    leave_out_padding_mask(model)  # and no other is made
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **words: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention as transformers' attention functions do, (batch, length, heads, width).

    Args:
        module: The attention layer.
        query: (batch, heads, length, width); packed rows are one, batch 1.
        key: (batch, key heads, length, width).
        value: Likewise.
        attention_mask: For rows that are not packed.
        scaling: Of the scores.
        dropout: Share of the probabilities set to zero.
        cu_seq_lens_q: Where each document begins and the last ends, int32; None where rows are not
            packed.
        max_length_q: Tokens that no document exceeds.
        words: What else transformers tells its attention functions.
    """
    if cu_seq_lens_q is None:
        words |= {"scaling": scaling, "dropout": dropout}
        return _plain(module, query, key, value, attention_mask, **words), None
    if attention_mask is not None:
        raise UnavailableError(
            '`attention` must be "sdpa" for this model, not "varlen": its layers mask rows '
            "themselves."
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):  # which does not know the kernel
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if device == "cuda" or stands_for_cuda:
        rows = (part.transpose(1, 2)[0] for part in (query, key, value))
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        output = torch.ops.aten._flash_attention_forward(
            *rows, *bounds, dropout, True, False, scale=scaling
        )[0]
        return output[None], None
    documents = []
    for begin, end in itertools.pairwise(cu_seq_lens_q.tolist()):
        if end > begin:
            parts = (part[:, :, begin:end] for part in (query, key, value))
            documents.append(_plain(module, *parts, None, scaling=scaling, dropout=dropout))
    return torch.cat(documents, dim=1), None


def _plain(module: torch.nn.Module, *tensors: torch.Tensor | None, **words: Any) -> torch.Tensor:
    """Return attention without bounds."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attend_with_mask: Any = sdpa_attention_forward
    output: torch.Tensor = attend_with_mask(module, *tensors, **words)[0]
    return output
