"""Numbers, times and sizes as a person writes them; the same in report and dataset card."""

from __future__ import annotations

import json
import time
from typing import Any

NOTHING = "–"


def number(value: float | None) -> str:
    """Three significant digits, thousands apart: 1,234, 12.3, 0.0123."""
    if value is None:
        return NOTHING
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def seconds(value: float | None) -> str:
    """45 ms, 1.2 s, 3 min 20 s, 5 h 3 min, 2 d 4 h."""
    if value is None:
        return NOTHING
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 99.95:
        return f"{value:.3g} s"
    whole = round(value)
    for small, large, names in ((1, 60, ("min", "s")), (60, 3600, ("h", "min")), (3600, 86400, ("d", "h"))):
        if whole < large * (24 if large == 3600 else 60) or large == 86400:
            rest = whole % large // small
            return f"{whole // large:,} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    raise AssertionError("unreachable")


def size(value: float | None) -> str:
    """Powers of ten, as disks and S3 bills count."""
    if value is None:
        return NOTHING
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{number(value)} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else NOTHING


def clock(unix_s: float | None) -> str:
    """UTC: workers, driver and reader may each sit in another zone."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s)) if unix_s else NOTHING


def setting(value: Any) -> str:
    """A setting's value as one writes it in a config."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def code(text: str) -> str:
    """Text of others as a code span in a table's cell: one line, and nothing in it is markup."""
    return "`" + " ".join(str(text).replace("`", "'").replace("|", "\\|").split()) + "`"


FILTERS = {function.__name__: function for function in (number, seconds, size, clock, setting, code)}
