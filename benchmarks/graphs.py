"""What torch.compile did in this process, and what it does with code that is called in more ways than it allows."""

from __future__ import annotations

import sys

MOST_GRAPHS = 4096  # of one function: as good as any number


def graphs_compiled() -> int:
    """So far. Does not import the compiler, which takes seconds, where nothing was compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def allow_many_graphs() -> None:
    """For processes that run blocks in more ways than a worker does; past the limit calls would run uncompiled."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_GRAPHS


def fail_past_the_limit() -> None:
    """Raise where a call would run uncompiled, as its code was compiled as often as is allowed."""
    import torch._dynamo

    torch._dynamo.config.fail_on_recompile_limit_hit = True
