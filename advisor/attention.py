"""Which attention a model has: kept, for who asks transformers imports torch, for seconds."""

from __future__ import annotations

import pickle

from lora_advisor.advisor.trace_cache import TraceCache, key_of
from lora_advisor.probes.architectures import Architecture, attention_of
from lora_advisor.probes.config import ATTENTIONS
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import detect_stack


def attention(architecture: Architecture, cache: TraceCache | None) -> str:
    """Return a model's attention, from the cache if there is one that has it."""
    if cache is None:
        return attention_of(architecture)
    known = known_attention(architecture, cache)
    if known is None:
        known = attention_of(architecture)
        cache.put(_key(architecture), {"attention": known})
    return known


def known_attention(architecture: Architecture, cache: TraceCache) -> str | None:
    """Return what the cache has; None for a model never asked about."""
    known = (cache.get(_key(architecture)) or {}).get("attention")
    return str(known) if known in ATTENTIONS else None


def learn_attention(architecture: Architecture, cache: TraceCache, server: ForkServer) -> None:
    """Have a server, which imports torch anyway, tell the cache what it lacks."""
    if known_attention(architecture, cache) is None:
        answer = server.ask("attention", pickle.dumps(architecture))
        if answer:
            cache.put(_key(architecture), {"attention": answer.decode("ascii")})


def _key(architecture: Architecture) -> str:
    return key_of(detect_stack(), None, architecture.fingerprint, {"asked": "attention"})
