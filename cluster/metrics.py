"""Numbers for Prometheus, through Ray's own exporter (`http://NODE:8080`, or as Ray is configured)."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge


class Gauges:
    """Named values that go up and down, under one prefix, each tagged with the run they are of."""

    def __init__(self, prefix: str, run: str, descriptions: Mapping[str, str]):
        self.gauges = {
            name: Gauge(f"{prefix}_{name}", description=text, tag_keys=("run",)) for name, text in descriptions.items()
        }
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": run})

    def set(self, **values: float) -> None:
        for name, value in values.items():
            self.gauges[name].set(value)
