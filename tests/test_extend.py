"""Few layers that seem not to repeat are looked at once more, then the whole model is traced."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_training import one_pass_config

from lora_advisor.probes import extend
from lora_advisor.probes.architectures import from_hf_config, resolve_architecture
from lora_advisor.probes.trace import trace_step


@pytest.mark.parametrize(("misses", "asked"), [(0, [5]), (1, [5, 5]), (2, [5, 5, None])])
def test_a_chance_difference_costs_another_look(
    misses: int, asked: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = dict(resolve_architecture("smollm2-135m").hf_config, num_hidden_layers=7)
    config = one_pass_config("any", precision="bf16")
    layers: list[int | None] = []
    repeats = extend._repeats
    found = iter([False] * misses)

    def traced(*given: Any, **words: Any) -> Any:
        layers.append(words.get("layers"))
        return trace_step(*given, **words)

    monkeypatch.setattr(extend, "trace_step", traced)

    def looked_at(*given: Any) -> bool:
        return next(found, True) and repeats(*given)

    monkeypatch.setattr(extend, "_repeats", looked_at)
    trace = extend.trace_all_layers(config, from_hf_config("any", figures), capability="8.9")
    assert layers == asked
    assert {event.phase for event in trace.events} >= {"load", "forward", "backward", "optimizer"}
