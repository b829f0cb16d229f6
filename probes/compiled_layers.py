"""Decoder layers that are compiled for the training step, and run as they are for all else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_advisor.probes.config import RunConfig

#: Programs that dynamo may keep of a layer before it gives up and runs it eagerly, without an
#: error (torch._dynamo.config.recompile_limit, 8 by default). A training needs up to 4 for each
#: length (the first layer's input wants no gradient, an epoch's last micro-batch has fewer rows),
#: and as many again after a lack of memory.
_PROGRAMS = 64


def compile_layers(config: RunConfig, layers: Iterable[Any], *, draws: bool) -> None:
    """Have each decoder layer compiled when it first runs in training mode.

    Evaluations run the layers as they are: theirs are batches of other sizes without gradients, and
    their programs would use up what dynamo keeps. An epoch's last micro-batch runs so too where it
    has half of the rows or fewer: its compilation would take longer than its pass.
    Packed micro-batches that a mask keeps apart are of any length, so that dynamo shall give up on
    them after its usual number; others are all of one (probes/packed_rows.py).

    Checkpointed attention takes the generator's state along on CUDA, for a dropout of zero too.
    Where nothing is drawn it need not; where something is, the state stands in the graph and not
    the generator, which keeps compiled code out of Inductor's cache (`GraphSafeRunWithRngState`
    in torch/_prims/rng_prims.py is not cacheable, 2.11 to 2.13).

    Args:
        config: Has the rows of a micro-batch, and whether they are packed.
        layers: The decoder's.
        draws: Whether a layer may draw random numbers.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    from torch._functorch import partitioners

    functorch.graphsafe_rng_functionalization = False
    question = partitioners.has_recomputable_rng_ops
    theirs = getattr(question, "theirs", question)
    vars(partitioners)["has_recomputable_rng_ops"] = theirs if draws else _nothing_drawn(theirs)
    if not config.packing:
        dynamo.recompile_limit = max(dynamo.recompile_limit, _PROGRAMS)
    half = 0 if config.packing else config.sequences // 2
    for layer in layers:
        layer.compile(dynamic=False)
        if layer._compiled_call_impl is not None:  # a trace compiles in its own way, and sets none
            program = layer._compiled_call_impl
            layer._compiled_call_impl = _in_training(layer, program, more_than=half)


def _nothing_drawn(theirs: Any) -> Any:
    """Return what answers no to the compiler's question whether what is recomputed draws."""

    def answer(_: Any) -> bool:
        return False

    vars(answer)["theirs"] = theirs
    return answer


def _in_training(layer: Any, compiled: Any, *, more_than: int) -> Any:
    """Return what a compiled layer's call is: its program while it trains, else itself.

    Args:
        layer: The layer.
        compiled: Calls its program.
        more_than: Sequences that are not worth a program.
    """

    def call(*arguments: Any, **words: Any) -> Any:
        states = arguments[0] if arguments else words["hidden_states"]
        worth_it = layer.training and states.shape[0] > more_than
        return (compiled if worth_it else layer._call_impl)(*arguments, **words)

    return call
