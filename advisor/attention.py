"""Which attention a model has: kept, for who asks transformers imports torch, for seconds."""

from __future__ import annotations

import pickle

from lora_advisor.advisor.trace_cache import TraceCache, key_of
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.attention_semantics import why_no_bounds
from lora_advisor.probes.config import ATTENTIONS
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import Machine, detect_stack
from lora_advisor.probes.packed_models import NOT_TOLD, attentions_of


def attention(architecture: Architecture, cache: TraceCache | None) -> str:
    """Return the attention of a model's rows that are not packed."""
    return _attentions(architecture, cache)[0]


def packed_attention(
    architecture: Architecture, cache: TraceCache | None, machine: Machine, precision: str
) -> str:
    """Return the attention of a model's packed rows on a machine."""
    why_not = why_not_varlen(architecture, cache, machine, precision)
    return _attentions(architecture, cache)[0 if why_not else -1]


def why_not_varlen(
    architecture: Architecture, cache: TraceCache | None, machine: Machine, precision: str
) -> str | None:
    """Return why a model's packed rows cannot be attended to by their bounds; None if they can."""
    if _attentions(architecture, cache)[-1] != "varlen":
        return f"`{architecture.name}` needs a mask: {NOT_TOLD}"
    return None if machine.kind == "cpu" else why_no_bounds(machine.capability, precision)


def known_attention(architecture: Architecture, cache: TraceCache) -> str | None:
    """Return what the cache has of rows that are not packed; None for a model never asked about."""
    known = _known(architecture, cache)
    return None if known is None else known[0]


def learn_attention(architecture: Architecture, cache: TraceCache, server: ForkServer) -> None:
    """Have a server, which imports torch anyway, tell the cache what it lacks."""
    if _known(architecture, cache) is None:
        answer = server.ask("attention", pickle.dumps(architecture))
        if answer:
            _keep(architecture, cache, tuple(answer.decode("ascii").split()))


def _attentions(architecture: Architecture, cache: TraceCache | None) -> tuple[str, ...]:
    """Return a model's attentions, from the cache if there is one that has them."""
    known = None if cache is None else _known(architecture, cache)
    if known is None:
        known = attentions_of(architecture)
        if cache is not None:
            _keep(architecture, cache, known)
    return known


def _known(architecture: Architecture, cache: TraceCache) -> tuple[str, ...] | None:
    known = tuple((cache.get(_key(architecture)) or {}).get("attentions") or ())
    return known if known and set(known) <= set(ATTENTIONS) else None


def _keep(architecture: Architecture, cache: TraceCache, attentions: tuple[str, ...]) -> None:
    cache.put(_key(architecture), {"attentions": list(attentions)})


def _key(architecture: Architecture) -> str:
    return key_of(detect_stack(), None, architecture.fingerprint, {"asked": "attentions"})
