"""TRL's fused loss with the gradient of the hidden states taken in the forward pass.

TRL's function (trl/kernels/chunked_logprob.py) computes every tile of logits twice: once for the
loss and once more for its gradient, three products with the head's weight in all. The gradient of
a token's log-probability is known up to one factor as soon as its logits are:

    d log p(t) / dh = (1 - p(t)) w(t) - sum over j other than t of p(j) w(j)

so it is gathered while the tiles pass, and the backward pass multiplies each row by what comes in.
That leaves two products. The softmax's maximum and sum are not known before the last tile; as in
flash attention (arXiv 2205.14135, section 3.1) what was gathered is scaled whenever the maximum
grows. The target stands apart, or bf16 would round away the small difference of a sure token.

Only where the head is frozen, as adapters leave it: otherwise, and without gradients, TRL's
function runs. What it takes and returns is the same, but that its entropy has no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from trl.kernels import ChunkedLogProbFunction
from trl.kernels import chunked_logprob as theirs

if theirs._TRITON_AVAILABLE:
    import triton.language as tl  # type: ignore[import-not-found]

#: A kernel of Triton's calls by name what is a global of its module.
_transform = theirs._transform
#: Outputs beside the log-probabilities that are known here; with others TRL's function runs.
_KNOWN = frozenset(("log_probs", "entropy", "is_top1"))
_BLOCK = 2048
#: Weights of columns are held so much larger in fp16, whose smallest number is 6e-8: a vocabulary
#: of 150,000 has many that are smaller, and the largest is 1.
_HALF = 1024.0


def take_one_pass(model: Any) -> None:
    """Have the fused loss of a model take its gradient in the forward pass."""
    from trl.trainer import utils

    model.get_output_embeddings().weight.one_pass = True
    utils._ChunkedLogProbFunction = _Choice


class _Choice:
    """Stands for TRL's function and calls it, or the one here for a head that is marked."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> Any:
        """Return what TRL's function returns."""
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        ours = (
            getattr(weight, "one_pass", False)
            and frozen
            and torch.is_grad_enabled()
            and hidden.requires_grad
            and _KNOWN.issuperset(rest[5])
        )
        function: Any = OnePassLogProb if ours else ChunkedLogProbFunction
        return function.apply(hidden, weight, bias, *rest)


class OnePassLogProb(torch.autograd.Function):
    """Log-probabilities of targets under `hidden @ weight.T`, of which no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """Return log-probabilities, entropy, two values not computed here, and top-1 hits, (N,).

        Args:
            ctx: autograd's.
            hidden: (N, H).
            weight: (V, H), frozen.
            bias: (V,), frozen, or None.
            targets: (N,), within the vocabulary.
            temperature: The logits are divided by it.
            chunk_size: Columns of a tile.
            softcap: Logits pass `softcap * tanh(logits / softcap)`; None for none.
            logit_scale: The logits are multiplied by it before that.
            outputs: What is asked for beside the log-probabilities.
        """
        ctx.set_materialize_grads(False)
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        boost = _HALF if dtype is torch.float16 else 1.0
        how = _How(logit_scale, softcap, 1 / temperature, "entropy" in outputs, boost)
        seen = _Seen.nothing(hidden)
        gradient = torch.empty_like(hidden)
        rows = max(1, min(len(hidden), theirs.TOKEN_CHUNK_SIZE))
        tiles = hidden.new_empty((rows, chunk_size), dtype=dtype)
        gathered = hidden.new_empty((rows, hidden.shape[1]), dtype=torch.float32)
        # Nothing is allocated for each part of the rows: what a step holds does not depend on how
        # many there are, and nor do the events of its trace.
        picked = weight.new_empty((rows, hidden.shape[1]))
        spare = hidden.new_empty((2, rows), dtype=torch.float32)
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            now, wanted = seen.of(part), targets[part]
            states = hidden[part].to(dtype)
            sums = gathered[: len(states)].zero_()
            for start in range(0, len(weight), chunk_size):
                columns = weight[start : start + chunk_size].to(dtype)
                tile = tiles[: len(states), : len(columns)]
                torch.mm(states, columns.t(), out=tile)
                if bias is not None:
                    tile.add_(bias[start : start + chunk_size].to(dtype))
                fold_tile(tile, wanted, now, sums, start, how)
                theirs._addmm_fp32(sums, tile, columns)
            targeted = torch.index_select(weight, 0, wanted, out=picked[: len(states)])
            gradient[part] = _gradient(targeted, now, sums, how, *spare[:, : len(states)])
        log_z = seen.top + seen.total.log()
        ctx.save_for_backward(gradient)
        hits = (seen.target >= seen.top) & (seen.target > seen.before)
        entropy = log_z - seen.weighted / seen.total if how.entropy else None
        others = [x for x in (hits, entropy) if x is not None]
        ctx.mark_non_differentiable(*others)
        return seen.target - log_z, entropy, None, None, hits if "is_top1" in outputs else None

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the hidden states, (N, H)."""
        (kept,) = ctx.saved_tensors
        of_hidden = None
        if gradients[0] is not None:
            of_hidden = (kept * gradients[0].unsqueeze(-1)).to(kept.dtype)
        return (of_hidden, *(None,) * 8)


@dataclass(frozen=True)
class _How:
    """What is done to a product to make a logit of it; `OnePassLogProb.forward` has the words."""

    scale: float
    softcap: float | None
    inverse_temperature: float
    entropy: bool
    boost: float

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """Return the logits of products, in their dtype."""
        scaled = products * self.scale
        if self.softcap is not None:
            scaled = self.softcap * torch.tanh(scaled / self.softcap)
        return scaled * self.inverse_temperature

    def slopes(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Return by how much logits grow with what is scaled, but for constant factors."""
        if self.softcap is None:
            return 1.0
        bent: torch.Tensor = logits / (self.softcap * self.inverse_temperature)
        return 1 - bent * bent

    @property
    def factor(self) -> float:
        """The constant factors."""
        return self.scale * self.inverse_temperature


class _Seen(NamedTuple):
    """What is known of each row's softmax from the tiles seen so far, (N,) each, in fp32.

    Attributes:
        top: The largest logit.
        total: The sum of e^(logit - top).
        others: That sum without the target.
        weighted: That sum with each term times its logit.
        before: The largest logit of a column before the target's.
        target: The target's logit.
    """

    top: torch.Tensor
    total: torch.Tensor
    others: torch.Tensor
    weighted: torch.Tensor
    before: torch.Tensor
    target: torch.Tensor

    @classmethod
    def nothing(cls, hidden: torch.Tensor) -> _Seen:
        """Return what is known of each row of (N, H) before the first tile."""
        starts = (-math.inf, 0.0, 0.0, 0.0, -math.inf, 0.0)
        return cls(*(hidden.new_full((len(hidden),), x, dtype=torch.float32) for x in starts))

    def of(self, rows: slice) -> _Seen:
        """Return some rows, sharing their memory."""
        return _Seen(*(part[rows] for part in self))


def _gradient(
    targeted: torch.Tensor, seen: _Seen, sums: torch.Tensor, how: _How,
    share: torch.Tensor, bent: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient of each row's log-probability, (n, H) in fp32, over `sums`.

    Args:
        targeted: (n, H); the head's weights of each row's target.
        seen: Of these rows.
        sums: (n, H) in fp32; what was gathered.
        how: What makes logits of products.
        share: (n,) in fp32, to be written over.
        bent: Likewise.
    """
    torch.mul(seen.total, -how.boost, out=share)
    sums.div_(share.unsqueeze(-1))
    torch.div(seen.others, seen.total, out=share)
    if how.softcap is not None:  # times 1 - bent^2, as `slopes`
        torch.div(seen.target, how.softcap * how.inverse_temperature, out=bent)
        share.addcmul_(share, bent.square_(), value=-1)
    sums.addcmul_(targeted, share.unsqueeze(-1))
    return sums if how.factor == 1 else sums.mul_(how.factor)


def fold_tile(
    tile: torch.Tensor, targets: torch.Tensor, seen: _Seen, sums: torch.Tensor,
    start: int, how: _How,
) -> None:  # fmt: skip
    """Add a tile of products to what is seen; leave in it the weights of its columns.

    Args:
        tile: (n, columns); becomes e^(logit - top) times slope and boost, zero at the target.
        targets: (n,).
        seen: Of these rows.
        sums: (n, H) in fp32, gathered under the top before; scaled to the new one.
        start: The first column's place in the vocabulary.
        how: What makes logits of products.
    """
    if theirs._use_triton(tile.device):
        _fold_kernel[(len(tile),)](
            tile, tile.stride(0), targets, *seen, sums, sums.stride(0), sums.shape[1],
            start, tile.shape[1], how.scale, how.softcap or 1.0, how.inverse_temperature,
            how.boost,
            HAS_SOFTCAP=how.softcap is not None, HAS_ENTROPY=how.entropy, BLOCK=_BLOCK,
        )  # fmt: skip
        return
    logits = how.logits(tile.float())
    local = (targets - start).unsqueeze(-1)
    columns = torch.arange(tile.shape[1], device=tile.device)
    here = (local >= 0) & (local < tile.shape[1])
    before = logits.masked_fill(columns >= local, -math.inf).amax(-1)
    seen.before.copy_(torch.maximum(seen.before, before))
    top = torch.maximum(seen.top, logits.amax(-1))
    scaled = torch.exp(seen.top - top)
    weights = torch.exp(logits - top.unsqueeze(-1))
    seen.total.mul_(scaled).add_(weights.sum(-1))
    seen.weighted.mul_(scaled).add_((weights * logits).sum(-1))
    weights.masked_fill_(columns == local, 0.0)
    seen.others.mul_(scaled).add_(weights.sum(-1))
    target = logits.gather(-1, local.clamp(0, tile.shape[1] - 1))
    seen.target.copy_(torch.where(here, target, seen.target.unsqueeze(-1)).squeeze(-1))
    seen.top.copy_(top)
    sums.mul_(scaled.unsqueeze(-1))
    tile.copy_(weights * how.slopes(logits) * how.boost)


@theirs._jit  # type: ignore[untyped-decorator]
def _fold_kernel(  # type: ignore[no-untyped-def]
    tile_ptr, tile_stride, targets_ptr,
    top_ptr, total_ptr, others_ptr, weighted_ptr, before_ptr, target_ptr,
    sums_ptr, sums_stride, hidden_size, vocab_start, n_cols, logit_scale, softcap, inv_t, boost,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    # `fold_tile`, one program a row
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * tile_stride
    local = tl.load(targets_ptr + row) - vocab_start
    old_top = tl.load(top_ptr + row)
    top = old_top
    before = tl.load(before_ptr + row)
    for first in range(0, n_cols, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        mask = offsets < n_cols
        z = tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = _transform(z, logit_scale, softcap, inv_t, HAS_SOFTCAP)
        z = tl.where(mask, z, -float("inf"))
        top = tl.maximum(top, tl.max(z, axis=0))
        before = tl.maximum(before, tl.max(tl.where(offsets < local, z, -float("inf")), axis=0))
    if (local >= 0) & (local < n_cols):
        z = tl.load(row_ptr + local).to(tl.float32)
        tl.store(target_ptr + row, _transform(z, logit_scale, softcap, inv_t, HAS_SOFTCAP))
    scaled = tl.exp(old_top - top)
    total = tl.load(total_ptr + row) * scaled
    others = tl.load(others_ptr + row) * scaled
    weighted = tl.load(weighted_ptr + row) * scaled
    for first in range(0, n_cols, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        mask = offsets < n_cols
        z = tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = _transform(z, logit_scale, softcap, inv_t, HAS_SOFTCAP)
        e = tl.where(mask, tl.exp(z - top), 0.0)
        total += tl.sum(e, axis=0)
        if HAS_ENTROPY:
            weighted += tl.sum(e * z, axis=0)
        e = tl.where(offsets == local, 0.0, e)
        others += tl.sum(e, axis=0)
        if HAS_SOFTCAP:
            bent = z / (softcap * inv_t)
            e = e * (1 - bent * bent)
        tl.store(row_ptr + offsets, (e * boost).to(tile_ptr.dtype.element_ty), mask=mask)
    tl.store(top_ptr + row, top)
    tl.store(before_ptr + row, before)
    tl.store(total_ptr + row, total)
    tl.store(others_ptr + row, others)
    tl.store(weighted_ptr + row, weighted)
    if (vocab_start > 0) & (scaled < 1.0):
        for first in range(0, hidden_size, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            mask = offsets < hidden_size
            ptrs = sums_ptr + row * sums_stride + offsets
            tl.store(ptrs, tl.load(ptrs, mask=mask) * scaled, mask=mask)
