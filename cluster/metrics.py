"""Numbers for Prometheus, through Ray's own exporter (`http://NODE:8080`, or as Ray is configured)."""

from __future__ import annotations

import string
from collections.abc import Mapping
from urllib.parse import quote

from ray.util.metrics import Gauge

TAG_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "


class Gauges:
    """Named values that go up and down, under one prefix, each tagged with the run they are of.

    Ray takes ASCII only in tags: other letters of the run's URL are there as URLs have them, `%C3%BC` for ü.
    """

    def __init__(self, prefix: str, run: str, descriptions: Mapping[str, str]):
        self.gauges = {
            name: Gauge(f"{prefix}_{name}", description=text, tag_keys=("run",)) for name, text in descriptions.items()
        }
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": quote(run, safe=TAG_CHARACTERS)})

    def set(self, **values: float) -> None:
        for name, value in values.items():
            self.gauges[name].set(value)
