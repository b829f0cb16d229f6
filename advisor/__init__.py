"""advisor: decides and acts. `autoconfigure` is what other people's scripts need of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_advisor.advisor.configuring import Setup, autoconfigure

__all__ = ["Setup", "autoconfigure"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for (PEP 562): this package loads at once."""
    if name in __all__:
        from lora_advisor.advisor import configuring

        return getattr(configuring, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
