"""The house: which file may import which. Read from the imports as they are written, those inside functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flashu", "manifests", "cluster", "jobs")

# From the ground up. A file may import what stands on its own line, if that is one room, or on a line below; where a
# line names several rooms, these know nothing of each other.
FLOORS = {
    "manifests": ["manifests"],
    "cluster": ["cluster manifests.s3_errors"],
    "jobs": [
        "flashu manifests cluster",
        "jobs.dataset jobs.metrics",
        "jobs.settings jobs.statistics",
        "jobs.worker jobs.report",
        "jobs.driver",
        "jobs.filtering jobs.scoring",
        "jobs.cli",
        "jobs.__main__",
    ],
}
