"""Peak memory of a patched model: pruning keeps no second copy of any weight."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# The process's peak only ever grows, so stock goes first: whatever FlashU takes beyond it shows. The settings measure
# layers, prune, skip, store and reuse the head's output, and end with a full step.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from generate import MID, VAES, measure, peak_memory_gib, random_model, random_scores
from flashu import FlashUConfig, Showo2Qwen2_5, apply_flashu_patch
from flashu.acceleration.plan import make_plan
from flashu.models import WanImageVAE

cpu = torch.device("cpu")
model, vae = random_model(Showo2Qwen2_5, MID, 0), random_model(WanImageVAE, VAES["mid"], 0)
scores = random_scores(model)
measure(model, vae, make_plan(None, 2, 7.5), 1, 62, MID.native_grid)
print(peak_memory_gib(cpu))
apply_flashu_patch(model, FlashUConfig(T_LS=2, T_cache=2, tau=2, schedule=None, num_inference_steps=5), scores=scores)
measure(model, vae, model.acceleration.plan(5, 7.5), 1, 62, MID.native_grid)
print(peak_memory_gib(cpu))
"""


def test_patched_model_takes_at_most_2_percent_more_memory():
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed leaves the process at once: its size is what is in use
    }
    command = [sys.executable, "-c", SCRIPT, BENCHMARKS]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    stock, patched = map(float, out.split())
    assert patched <= 1.02 * stock, f"{patched:.3f} GiB against {stock:.3f}"
