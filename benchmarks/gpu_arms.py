"""The ways of making images that `gpu.py` compares: the release's and ours, each unaccelerated and with FlashU.

They run over one set of weights, of which a device holds one copy. A way is entered before it makes images, and then
holds what it alone needs: its VAE, pruned weights, or FFNs in float8; so its peak memory is its own, but for the FFNs
that an arm in float8 does not run.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from generate import Stopwatch
from gpu_bench import Bench
from gpu_switches import (
    attending,
    convolved_patches,
    ffns_in_float8,
    measured_by_parts,
    rest_uncompiled,
    without_cudnn_attention,
)
from PIL import Image
from release_modules import Batch
from release_shaped import layers_to_skip
from release_vae import ReleaseVae
from time_split import Call
from torch.utils.flop_counter import FlopCounterMode

from flashu import sampler
from flashu.acceleration.applied import Acceleration, remove_flashu_patch
from flashu.acceleration.plan import PlannedStep, make_plan, release_plan
from flashu.config import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, FlashUConfig, flashu_preset
from flashu.flops import count_image, count_release
from flashu.models.geometry import PATCH_SIZE
from flashu.models.graphs import Graphs
from flashu.models.wan_vae import to_pixels
from flashu.patch import apply_flashu_patch
from flashu.pending import PendingPictures
from flashu.pipeline import TextToImagePipeline

WARM_UP = 2  # evaluations, where all are alike
PROFILED = 8  # likewise

ONCE = "prefix, times"  # what an image takes once in its run, and not at every step
VAE = "VAE"


@dataclass(frozen=True)
class Timing:
    seconds: float  # from prompts to pictures on the host
    loop_s: float  # of these, up to the end of the last step


@dataclass(frozen=True)
class Flop:
    """Of one image."""

    loop: int
    vae: int


class Ours:
    """This library, by its own pipeline."""

    def __init__(
        self,
        bench: Bench,
        settings: FlashUConfig | None,
        compile_mode: str = "off",
        float8: bool = False,
        natural: bool = False,
        under: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """`natural`: no batch is timed on prompts that an earlier one had, and each prompt is of another length.

        `under`: makes what is entered around all that the arm does, such as a switch of PyTorch's.
        """
        self.bench, self.settings, self.compile_mode, self.float8 = bench, settings, compile_mode, float8
        self.natural = bench.natural_prompts() if natural else []
        self.under = under
        self.compiled = False  # whether blocks really are; known once it is entered
        self.why_uncompiled: str | None = None  # where they were to be, and the compiler does not work
        self._next_prompts = itertools.cycle(self.natural)
        self.vae = bench.vae
        self.evaluations = (settings.total_steps if settings else NUM_INFERENCE_STEPS) - 1
        # The first batch has calls made as they are, and the second captures those that come once in a batch.
        self._warm_ups = 2 if compile_mode == "graphs" else 1
        self.warm_up_share = self._warm_ups * (1.0 if settings else WARM_UP / self.evaluations)

    def __enter__(self) -> Ours:
        model = self.bench.model
        with ExitStack() as stack:
            stack.enter_context(self.under())
            if self.float8:
                stack.enter_context(ffns_in_float8(model))
            stack.callback(self.vae.to, "cpu")
            self.vae.to(self.bench.device)
            if self.settings:
                apply_flashu_patch(model, self.settings, scores=self.bench.scores)
                stack.callback(remove_flashu_patch, model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.pipe = TextToImagePipeline(model, self.vae, self.bench.tokenizer).compile(self.compile_mode)
            said = [str(warning.message) for warning in caught]
            self.why_uncompiled = next((text for text in said if "uncompiled" in text), None)
            self.compiled = self.pipe.blocks.compiled
            if self.graphs:
                stack.callback(self.graphs.drop)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    def generate(self, count: int, evaluations: int | None = None) -> list[Image.Image]:
        """The first `count` prompts' pictures as one batch; without FlashU, fewer evaluations may be asked for."""
        return self._generate(self._prompts(count), evaluations)

    def submit(self, count: int) -> PendingPictures:
        """Begin what `generate` makes."""
        return self.pipe.submit(**self._asked(self._prompts(count)))

    def batches(self, count: int) -> int:
        """How many batches of so many images are timed at least: natural ones until they would begin anew."""
        return max(1, len(self.natural) // count)

    def _prompts(self, count: int) -> list[str]:
        return list(itertools.islice(self._next_prompts, count)) if self.natural else self.bench.prompts(count)

    def _generate(self, prompts: list[str], evaluations: int | None) -> list[Image.Image]:
        return self.pipe(**self._asked(prompts, evaluations), batch_size=len(prompts))

    def _asked(self, prompts: list[str], evaluations: int | None = None) -> dict[str, Any]:
        return {
            "prompts": prompts,
            "seeds": list(range(len(prompts))),
            "num_inference_steps": (evaluations or self.evaluations) + 1,
            "guidance_scale": GUIDANCE_SCALE,
            "size": self.bench.size,
        }

    def warm_up(self, count: int) -> None:
        for _ in range(self._warm_ups):
            self._generate(self.bench.prompts(count), None if self.settings else WARM_UP)

    @property
    def graphs(self) -> Graphs | None:
        """Where calls are captured; known once it is entered."""
        return self.pipe.blocks.graphs

    def calls(self) -> list[Call]:
        """Which methods are which part of the network."""
        model = self.bench.model
        return [
            (model, "_embed_span", "image path"),  # which may be one captured call
            (model, "run_llm", "LLM"),
            (model, "measure_llm", "LLM"),
            (model, "run_head", "head"),
            (model, "lay_out_text", ONCE),
            (model, "read_text", ONCE),
            (model, "embed_times", ONCE),
            (self.vae, "decode_pixels", VAE),
        ]

    def count_flop(self) -> Flop:
        bench = self.bench
        if self.settings:
            accelerated = Acceleration.of(self.settings, bench.config.llm)
            plan = accelerated.plan(self.evaluations + 1, GUIDANCE_SCALE)
        else:
            plan = make_plan(None, self.evaluations + 1, GUIDANCE_SCALE)
        prefix = round(statistics.median(bench.prompt_lengths(64))) + 2
        cost = count_image(bench.config, bench.vae_geometry, plan, bench.grid, prefix)
        vae = cost.parts["VAE decode"]
        return Flop(cost.total - vae, vae)


class Release:
    """The release's way, see `release_shaped.py`."""

    compile_mode, compiled, why_uncompiled, graphs = "off", False, None, None

    def __init__(self, bench: Bench, settings: FlashUConfig | None):
        self.bench, self.settings = bench, settings
        count = settings.total_steps if settings else NUM_INFERENCE_STEPS
        self.steps = release_plan(settings, count, GUIDANCE_SCALE).steps
        self.evaluations = len(self.steps)
        # With FlashU, at least one step of each kind: all up to the first that reuses the head's output, and the last.
        few = (settings.T_cache or 1) + 1 if settings else WARM_UP
        self._warm_up_steps = [*self.steps[:few], *(self.steps[-1:] if settings else [])]
        self.warm_up_share = len(self._warm_up_steps) / self.evaluations

    @property
    def vae(self) -> ReleaseVae:
        return self.bench.release_vae

    def __enter__(self) -> Release:
        with ExitStack() as stack:
            stack.callback(self.vae.to, "cpu")
            self.vae.to(self.bench.device)
            stack.callback(self.bench.release.forget_pruned_ffns)
            if self.settings and self.settings.r_p:
                self.bench.release.prune_ffns(self.bench.scores.ffn, self.settings.r_p)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    def generate(self, count: int, evaluations: int | None = None) -> list[Image.Image]:
        """As `Ours.generate`."""
        return self._generate(count, self.steps[:evaluations])

    def warm_up(self, count: int) -> None:
        self._generate(count, self._warm_up_steps)

    def batches(self, count: int) -> int:
        """As `Ours.batches`."""
        return 1

    def _generate(self, count: int, steps: Sequence[PlannedStep]) -> list[Image.Image]:
        bench = self.bench
        limit = bench.config.max_text_tokens(bench.grid[0] * bench.grid[1])
        texts = [bench.tokenizer.encode_prompt(prompt, limit) for prompt in [*bench.prompts(count), *[""] * count]]
        rows = sampler.PromptTokens([text.prefix for text in texts], [text.suffix for text in texts], bench.grid)
        height, width = (side * PATCH_SIZE for side in bench.grid)
        noise = sampler.initial_noise(range(count), bench.config.image_latent_dim, height, width)
        points = sampler.time_grid(len(steps) + 1)
        latents = bench.release.sample(noise, rows, points, steps, layers_to_skip(self.settings, bench.config))
        return [Image.fromarray(to_pixels(image).cpu().numpy()) for image in self.vae.decode(latents)]

    def calls(self) -> list[Call]:
        """As `Ours.calls`."""
        release = self.bench.release
        return [
            (Batch, "of", ONCE),
            (release, "embed_images", "image path"),
            (release, "run_llm", "LLM"),
            (release, "run_head", "head"),
            (release, "run_final", "head"),
            (self.vae, "decode", VAE),
        ]

    def count_flop(self) -> Flop:
        bench = self.bench
        loop = sum(count_release(bench.config, self.settings, self.evaluations + 1, bench.grid))
        with torch.device("meta"):
            vae = ReleaseVae(bench.vae_geometry)
            latents = torch.empty(1, bench.vae_geometry.z_dim, *(side * PATCH_SIZE for side in bench.grid))
        with FlopCounterMode(display=False) as counter:
            vae.decode(latents)
        return Flop(loop, counter.get_total_flops())


@dataclass(frozen=True)
class Arm:
    """A named setting that is measured. An option of the library is a field more here, which `Ours` applies."""

    way: type[Ours] | type[Release]
    accelerated: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    by_default: tuple[str, ...] = ("cpu", "cuda")  # devices on which it is measured unless other arms are named
    preset: str | None = None  # of FlashU, where it is not the one that the run names
    compiled_with: str | None = None  # an arm that runs blocks in no other way, so that it compiles them for this one
    hazardous: bool = False  # may fail as no process survives it, and so comes after what matters
    aside: bool = False  # measured beside the leader only: at the smallest batch size, and at the leader's best

    def on(self, bench: Bench) -> Ours | Release:
        settings = flashu_preset(self.preset) if self.preset else bench.settings if self.accelerated else None
        return self.way(bench, settings, **self.options)


AUTO = {"compile_mode": "auto"}  # as in a run: on CUDA
GRAPHS = {"compile_mode": "graphs"}


def switched(under: Callable[[], AbstractContextManager[None]]) -> Arm:
    """Our leader with one thing switched, measured where it is named."""
    return Arm(Ours, True, {"under": under, **AUTO}, by_default=(), aside=True)


ARMS = {
    "release": Arm(Release),
    "release-flashu": Arm(Release, accelerated=True),
    "ours": Arm(Ours, options=AUTO),
    "ours-flashu": Arm(Ours, True, AUTO),
    "ours-few-steps": Arm(Ours, True, AUTO, preset="few-steps", compiled_with="ours"),
    "ours-flashu-uncompiled": Arm(Ours, True, by_default=("cuda",)),
    "ours-flashu-natural": Arm(Ours, True, {"natural": True, **AUTO}, compiled_with="ours-flashu", aside=True),
    "ours-graphs": Arm(Ours, False, GRAPHS, ("cuda",), compiled_with="ours", hazardous=True),
    "ours-flashu-graphs": Arm(Ours, True, GRAPHS, ("cuda",), compiled_with="ours-flashu", hazardous=True),
    "ours-few-steps-graphs": Arm(Ours, True, GRAPHS, ("cuda",), "few-steps", compiled_with="ours", hazardous=True),
    "ours-flashu-natural-graphs": Arm(
        Ours, True, {"natural": True, **GRAPHS}, ("cuda",), compiled_with="ours-flashu", hazardous=True, aside=True
    ),
    # These are compiled once more wherever they are entered. On a CPU the first would be the one before.
    "ours-flashu-natural-no-cudnn": Arm(
        Ours, True, {"natural": True, "under": without_cudnn_attention, **AUTO}, by_default=("cuda",), aside=True
    ),
    "ours-flashu-native-groups": switched(partial(attending, native_groups=True)),
    "ours-flashu-one-call": switched(partial(attending, joint_rows=sys.maxsize)),
    "ours-flashu-convolved-patches": switched(convolved_patches),
    "ours-flashu-measured-by-parts": switched(measured_by_parts),
    "ours-flashu-rest-uncompiled": switched(rest_uncompiled),
    "ours-flashu-max": Arm(Ours, True, {"compile_mode": "max"}, by_default=(), hazardous=True),
    "ours-flashu-float8": Arm(Ours, True, {"float8": True, **AUTO}, by_default=("cuda",), hazardous=True),
}
BASELINES = ("release", "release-flashu")  # what others are compared with
LEADER = "ours-flashu"
MAIN = (LEADER, *BASELINES, "ours")  # whose best batch sizes are looked for first, in this order
SAME_PICTURES = {
    "ours": "release",
    "ours-flashu": "release-flashu",
    "ours-flashu-uncompiled": "ours-flashu",
    "ours-flashu-max": "ours-flashu",
    "ours-graphs": "ours",
    "ours-flashu-graphs": "ours-flashu",
    "ours-few-steps-graphs": "ours-few-steps",
    **{name: LEADER for name, arm in ARMS.items() if "under" in arm.options and "natural" not in arm.options},
}  # but for rounding


def timed(way: Ours | Release, count: int) -> tuple[Timing, list[Image.Image]]:
    """Make one batch of a way that is entered, and tell how long it took."""
    wait = Stopwatch(way.bench.device).wait
    marks: list[float] = []
    decode = way.vae.decode

    def marked(latents: torch.Tensor) -> torch.Tensor:
        if not marks:
            wait()
            marks.append(time.perf_counter())
        return decode(latents)

    way.vae.decode = marked
    try:
        wait()
        start = time.perf_counter()
        pictures = way.generate(count)
        wait()
        return Timing(time.perf_counter() - start, marks[0] - start), pictures
    finally:
        del way.vae.decode
