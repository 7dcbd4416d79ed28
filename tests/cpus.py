"""The numeric tests under everything that PyTorch can be told to use of a CPU: `make test-cpus`.

    python -m tests.cpus

A CPU that is not at hand computes with kernels that one at hand can be told to use: other instruction sets of ATen's,
oneDNN's and MKL's, and another number of threads. Bounds that hold under all of them (`tests/bounds.py`) hold on other
machines. Run are the tests of files that take their bounds from there, slow ones apart; NumPy's OpenBLAS computes
nothing in them. What this CPU cannot do is left out and said, as it would be run as something else.

Where ATen is told of less than a CPU with AVX-512 has, PyTorch's own attention in bfloat16 raises ("pack_vnni2 is only
supported when avx512 is supported", seen with 2.13), so there the tests in float32 are run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Setting:
    name: str
    environment: dict[str, str] = field(default_factory=dict)
    flag: str = "sse4_1"  # of the CPU, without which it would be run as another
    threads: int = 1

    @property
    def chosen(self) -> str:
        """Which tests, as pytest's -k takes it."""
        less = self.environment.get("ATEN_CPU_CAPABILITY") in ("default", "avx2")
        return "not bfloat16 and not float8" if less else ""


PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
SETTINGS = [
    Setting("as it is"),
    Setting("two threads", threads=2),
    Setting("ATen default", {"ATEN_CPU_CAPABILITY": "default"}),
    Setting("ATen avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
    Setting("ATen avx512", {"ATEN_CPU_CAPABILITY": "avx512"}, "avx512bw"),
    Setting("oneDNN AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2"),
    Setting("oneDNN AVX512_CORE", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512bw"),
    Setting("oneDNN AVX512_CORE_BF16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
    Setting("MKL COMPATIBLE", {"MKL_CBWR": "COMPATIBLE"}),
    Setting("MKL AVX2", {"MKL_CBWR": "AVX2"}, "avx2"),
    Setting("all at their plainest", PLAIN),
    Setting("all at AVX2, two threads", {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2",
    }, "avx2", threads=2),
]  # fmt: skip


def main() -> int:
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if is_numeric(file))
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    print(f"{len(files)} files\n\n{'setting':<28}{'passed':>8}{'failed':>8}{'seconds':>9}", flush=True)
    all_well = True
    for setting in SETTINGS:
        if setting.flag not in flags:
            print(f"{setting.name:<28}  left out: this CPU has no {setting.flag}", flush=True)
            continue
        start = time.monotonic()
        out = run(setting, files)
        passed, failed = (
            sum(map(int, re.findall(rf"(\d+) {words}", out[-300:]))) for words in ("passed", "(?:failed|error)")
        )
        only = "   in float32" if setting.chosen else ""
        print(f"{setting.name:<28}{passed:>8}{failed:>8}{time.monotonic() - start:>9.0f}{only}", flush=True)
        if failed or not passed:
            all_well = False
            print(out, flush=True)
    return 0 if all_well else 1


def is_numeric(file: Path) -> bool:
    return "from tests.bounds import" in file.read_text(encoding="utf-8")


def run(setting: Setting, files: list[str]) -> str:
    """What pytest prints."""
    threads = {name: str(setting.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    processes = max(1, (os.cpu_count() or 1) // setting.threads)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-n", str(processes), "--no-loadscope-reorder"]
    command += ["-k", setting.chosen] if setting.chosen else []
    environment = os.environ | threads | setting.environment
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
