"""Training on padded rows as on full ones: no mask for what is padded on the right.

A padding mask switches attention to a slower, larger path: none of the flash kernels takes one, K
and V are repeated for grouped queries, and the host reads the mask back to see whether it hides
anything (transformers/masking_utils.py). Rows that are padded on the right do not need it: in
causal attention no token of a row sees what stands behind it, and padding has no label.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any


def leave_out_padding_mask(model: Any) -> bool:
    """Have a model's decoder take no padding mask while it trains; return whether it does.

    The mask that the trainer gives stays where it is: it counts tokens by it. Evaluation and
    generation, whose rows may be padded on the left, keep theirs, and so does a model whose tokens
    see what follows them.

    Args:
        model: Trained on rows that are padded on the right, and on no others.
    """
    text = model.config.get_text_config()
    decoder = getattr(model, "get_decoder", lambda: None)()
    if decoder is None or getattr(text, "use_bidirectional_attention", False):
        return False
    if "_leaves_out_padding" in vars(decoder):
        return True
    vars(decoder)["_leaves_out_padding"] = True
    decoder.register_forward_pre_hook(_without_mask, with_kwargs=True)
    plain = decoder.forward

    @functools.wraps(getattr(plain, "__func__", plain))
    def forward(self: Any, *arguments: Any, **words: Any) -> Any:
        try:
            return plain(*arguments, **words)
        finally:  # after Ctrl-C too, of which hooks are not told
            _ask_again(self)

    decoder.forward = MethodType(forward, decoder)
    return True


def _without_mask(decoder: Any, arguments: Any, words: dict[str, Any]) -> Any:
    if words.get("cu_seq_lens_q") is not None and decoder.config._attn_implementation == "varlen":
        _ask_nothing(decoder)  # attention is told where packed rows begin
    mask = words.get("attention_mask")
    # One of four dimensions, or one for each kind of layer, says more than what is padding.
    if decoder.training and getattr(mask, "ndim", 0) == 2:
        words = {**words, "attention_mask": None}
        if words.get("position_ids") is None:
            _ask_nothing(decoder)
    return arguments, words


def _ask_nothing(decoder: Any) -> None:
    """Have transformers not look for packed rows, until the decoder's forward pass ends.

    Without a mask it reads the positions back to see whether rows are packed, and the host waits
    until the device has done all that came before; where they are, it makes a mask. Positions that
    the decoder counts itself are of rows that are not.
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    if original is not _not_packed:
        vars(decoder)["_finds_packed"] = original
        vars(masking_utils)["find_packed_sequence_indices"] = _not_packed


def _ask_again(decoder: Any) -> None:
    from transformers import masking_utils

    original = vars(decoder).pop("_finds_packed", None)
    if original is not None:
        vars(masking_utils)["find_packed_sequence_indices"] = original


def _not_packed(_: Any) -> None:
    """Stand for transformers' function: no row is packed."""
