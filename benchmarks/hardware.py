"""What a result was measured on, for the JSON that is committed with it."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def describe_host() -> dict[str, Any]:
    """Date, Python's version and the CPU's name."""
    today = datetime.now(timezone.utc).date().isoformat()
    return {"date": today, "python": platform.python_version(), "cpu": _cpu_name()}


def describe(device: torch.device) -> dict[str, Any]:
    """The host, PyTorch's version, and the name and size of what computes."""
    import torch

    facts = describe_host() | {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    elif device.type == "cpu":
        facts["threads"] = torch.get_num_threads()
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
