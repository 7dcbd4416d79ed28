"""What torch.compile did in this process, and what it does with code that is called in more ways than it allows."""

from __future__ import annotations

import sys


def graphs_compiled() -> int:
    """So far. Does not import the compiler, which takes seconds, where nothing was compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def fail_past_the_limit() -> None:
    """Raise where a call would run uncompiled, as its code was compiled as often as is allowed."""
    import torch._dynamo

    torch._dynamo.config.fail_on_recompile_limit_hit = True
