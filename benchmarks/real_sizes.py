"""Make a checkpoint of Show-o2's real sizes, laid out as the release is, and measure what it takes to use it.

    python benchmarks/real_sizes.py --preset show-o2-1.5b --shard-size 3GB --json result.json
    python benchmarks/real_sizes.py --preset show-o2-7b --folder DIR --steps load evaluate

The weights are random, in bfloat16, and written shard by shard; beside them stand a VAE of the Wan 2.1 file's sizes and
the built-in model's tokenizer. They take twice the model's size on the disk, with `convert`, and stay in a `--folder`
for the next time. Then each step runs in a process of its own, which reads the files from the disk:

    load      `Showo2Qwen2_5.from_pretrained`, as stored
    convert   `flashu convert`, to bfloat16
    setup     a worker's, without FlashU, in bfloat16; and again of what `convert` wrote, where it did
    setup_flashu  the same with FlashU at the paper's settings, calibrated as the release does: one forward, then the
              FFNs in another order
    evaluate  one evaluation of an image with guidance, of a prompt of 62 tokens with bos and boi; loading and
              the prefix come before

Reported are a step's seconds, and the most memory that its process had: resident, and anonymous, which leaves out pages
of mapped files, as these are dropped where memory is wanted. Of anonymous memory some is taken by imports, before the
step begins. Everything is on the CPU. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardware import describe_host

from flashu.checkpoints.files import EMBEDDED_FOLDER, RELEASED_VAE
from flashu.models.geometry import BUILT_IN_LLMS
from flashu.models.presets import PRESETS

if TYPE_CHECKING:
    import torch

    from jobs.settings.config import FlashUSection

STEPS = ("load", "convert", "setup", "setup_flashu", "evaluate")
RELEASED, CONVERTED = "released", "converted"  # what the two folders are called
PROMPT_TOKENS = 62
PROMPT = "a photograph of a lighthouse on a rocky coast at dusk, waves breaking below"
SAMPLE_S = 0.05
GIB = 2**30


# ------------------------------------------------------------------------------------------- the checkpoint's files


def make(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write a release's folder. No more than one shard is held at a time."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    from flashu.checkpoints.weights import LAYOUTS, RELEASE
    from flashu.models import Showo2Qwen2_5
    from flashu.pretrained import EMBEDDING, HEAD

    config = PRESETS[options.preset]
    with torch.device("meta"):
        weights = Showo2Qwen2_5(config).to(torch.bfloat16).state_dict()
    if config.llm.tie_word_embeddings:  # on the meta device its two names would be counted as two tensors
        del weights[HEAD]
    pattern, index_name, _ = LAYOUTS[RELEASE]
    split = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=options.shard_size)
    size, free = split.metadata["total_size"], shutil.disk_usage(folder.parent).free
    if size + GIB > free:
        sys.exit(f"no room for {size / GIB:.1f} GiB: {folder.parent} has {free / GIB:.1f} GiB")
    files = dict(split.tensor_to_filename)
    generator = torch.Generator().manual_seed(0)
    with measured() as figures:
        folder.mkdir()
        for file, names in split.filename_to_tensors.items():
            shard = {name: draw(name, weights[name], generator) for name in names}
            if config.llm.tie_word_embeddings and EMBEDDING in shard:
                shard[HEAD], files[HEAD] = shard[EMBEDDING], file
            torch.save(shard, folder / file)
            del shard
        if split.is_sharded:
            write_json(folder / index_name, {"metadata": split.metadata, "weight_map": files})
        write_json(folder / "config.json", config.to_release_dict())
        shutil.copytree(EMBEDDED_FOLDER / "tokenizer", folder / "tokenizer")
        if config.llm_model_path in BUILT_IN_LLMS:
            write_released_vae(folder / RELEASED_VAE, generator)
        else:
            shutil.copytree(EMBEDDED_FOLDER / "vae", folder / "vae")
    parameters = sum(weight.numel() for weight in weights.values())
    return {**figures, "parameters": parameters, "gib": size / GIB, "shards": len(split.filename_to_tensors)}


def draw(
    name: str, weight: torch.Tensor, generator: torch.Generator, shape: tuple[int, ...] | None = None
) -> torch.Tensor:
    """A tensor for a weight on the meta device, of a `shape` if it is of another there.

    Gains are 1, biases 0, embeddings N(0, 0.02²), the rest N(0, 1 / fan_in).
    """
    import torch

    drawn = torch.empty(shape or weight.shape, dtype=weight.dtype)
    if name.endswith("bias"):
        return drawn.zero_()
    if weight.ndim == 1 or name.endswith("gamma"):
        return drawn.fill_(1)
    std = 0.02 if "embed_tokens" in name or name == "position_embedding.weight" else weight[0].numel() ** -0.5
    return drawn.normal_(0, std, generator=generator)


def write_released_vae(file: Path, generator: torch.Generator) -> None:
    """The Wan 2.1 file, in float32: the kernels of a video, but for the temporal resampling, which images pass over."""
    import torch

    from flashu.models import WanImageVAE
    from flashu.models.geometry import VaeGeometry

    with torch.device("meta"):
        folded = WanImageVAE(VaeGeometry()).state_dict()
    weights = {}
    for name, weight in folded.items():
        in_space = weight.ndim < 4 or any(part in name for part in (".resample.", ".to_qkv.", ".proj."))
        shape = weight.shape if in_space else (*weight.shape[:2], weight.shape[-1], *weight.shape[2:])
        weights[name] = draw(name, weight, generator, shape)
    torch.save(weights, file)


def write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------- the steps, each in its own process


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Time a step's work, imports left out: seconds, and those of the CPUs, which a busy machine disturbs less."""
    figures: dict[str, Any] = {"anonymous_before_gib": memory_gib("RssAnon")}
    start, cpu_start = time.perf_counter(), time.process_time()
    yield figures
    figures |= {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}


def load(folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    from flashu.models import Showo2Qwen2_5

    with measured() as figures:
        model = Showo2Qwen2_5.from_pretrained(folder)
    return {**figures, "dtype": model.number_format}


def convert(folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    import flashu.pipeline  # noqa: F401 - before the clock starts
    from jobs.cli.main import main

    destination = folder.parent / CONVERTED
    shutil.rmtree(destination, ignore_errors=True)
    sys.argv = ["flashu", "convert", str(folder), str(destination)]
    with measured() as figures:
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
    return {**figures, "files": sorted(file.name for file in destination.glob("*.safetensors"))}


def setup(folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    from jobs.settings.config import FlashUSection

    return set_up(folder, FlashUSection(preset="off"))


def setup_flashu(folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    from jobs.settings.config import FlashUSection

    return set_up(folder, FlashUSection(preset="paper-1.5b", calibration="release"))


def set_up(folder: Path, flashu: FlashUSection) -> dict[str, Any]:
    from cluster.open_storage import open_storage
    from cluster.storage import S3Options
    from jobs.settings.acceleration import flashu_settings
    from jobs.settings.config import ModelSection, SamplingSection
    from jobs.worker import model as worker_model

    model = ModelSection(path=str(folder), dtype="bfloat16")
    settings = flashu_settings(flashu, SamplingSection())
    shutil.rmtree(folder.parent / "run", ignore_errors=True)  # where the scores of an earlier one are
    run = open_storage(str(folder.parent / "run"))
    with measured() as figures:
        ready = worker_model.load(model, flashu, settings, run, S3Options(), "cpu", lambda: PROMPT)
    return {**figures, "dtype": ready.dtype, "identity": ready.identity}


def evaluate(folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    import torch

    from flashu import sampler
    from flashu.models import Showo2Qwen2_5
    from flashu.models.geometry import PATCH_SIZE

    before = memory_gib("RssAnon")
    model = Showo2Qwen2_5.from_pretrained(folder, dtype="bfloat16")
    config, generator = model.config, torch.Generator().manual_seed(1)
    height, width = (PATCH_SIZE * side for side in config.native_grid)
    noise = sampler.initial_noise([0], config.image_latent_dim, height, width)
    bos, *text, boi = torch.randint(config.llm_vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    with torch.no_grad():
        times = model.embed_times(sampler.time_grid(2)[:-1])
        with measured() as making_prefix:
            prefix = model.encode_prefix([[bos, *text, boi], [bos, boi]], config.native_grid, guided=True)
        with measured() as figures:
            velocity = model.velocity(noise, times.at(0), prefix)
        with measured() as again:
            model.velocity(noise, times.at(0), prefix)
    if not velocity.isfinite().all():
        sys.exit("the velocity is not finite")
    figures |= {"prefix_s": making_prefix["seconds"], "again_s": again["seconds"]}
    figures |= {"again_cpu_s": again["cpu_s"], "threads": torch.get_num_threads()}
    figures |= {"anonymous_before_gib": before, "dtype": model.number_format, "native_grid": config.native_grid}
    return figures


WORK: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "make": make,
    "load": load,
    "convert": convert,
    "setup": setup,
    "setup_flashu": setup_flashu,
    "evaluate": evaluate,
}


def work(step: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a step's own process measures."""
    figures = WORK[step](folder, options)
    # As `ru_maxrss`, but for that being of the process that started this one where that was larger.
    return {**figures, "peak_rss_gib": memory_gib("VmHWM"), "peak_anonymous_gib": memory_gib("RssAnon")}


# --------------------------------------------------------------------------------------- starting and watching them


def memory_gib(field: str, process: int | str = "self") -> float:
    """One of a process's figures in /proc; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    kib = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
    return kib[0] * 1024 / GIB if kib else 0.0


def run(step: str, folder: Path, options: argparse.Namespace, limit_s: float | None) -> dict[str, Any]:
    """Run a step in its own process, and sample that one's memory from here, where nothing keeps a thread waiting."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--preset", options.preset]
    command += ["--shard-size", options.shard_size]
    peak, start = 0.0, time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    with process:
        try:
            while True:
                try:
                    out, err = process.communicate(timeout=SAMPLE_S)
                    break
                except subprocess.TimeoutExpired:
                    peak = max(peak, memory_gib("RssAnon", process.pid))
                if limit_s is not None and time.perf_counter() - start > limit_s:
                    return {"failed": f"took longer than {limit_s:g} s", "peak_anonymous_gib": peak}
        finally:
            process.kill()  # where it has not ended, also as this one is stopped
    sys.stderr.write(err)
    if process.returncode:
        told = [f"ended by signal {-process.returncode}"] if process.returncode < 0 else err.strip().splitlines()
        return {"failed": (told or ["no word of why"])[-1].replace(f"{folder.parent}/", ""), "peak_anonymous_gib": peak}
    figures = json.loads(out.splitlines()[-1])
    return {**figures, "peak_anonymous_gib": max(peak, figures["peak_anonymous_gib"])}


def write_out_and_drop(folder: Path) -> None:
    """Have no file of a folder in memory, so that the next one to read it reads the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            opened = os.open(file, os.O_RDONLY)
            try:
                os.fsync(opened)
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(opened)


def measure(top: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of each step, those of making included unless the folder is there already."""
    released, converted = top / RELEASED, top / CONVERTED
    steps: dict[str, dict[str, Any]] = {}

    def take(name: str, step: str, folder: Path, limit_s: float | None) -> None:
        write_out_and_drop(top)
        steps[name] = work(step, folder, options) if options.here else run(step, folder, options, limit_s)
        print(shown(name, steps[name]), flush=True)

    if not released.exists():
        partial = top / f"{RELEASED}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        take("make", "make", partial, None)
        if "failed" in steps["make"]:
            return steps
        partial.rename(released)
    for step in STEPS:
        if step in options.steps:
            take(step, step, released, options.limit)
            if step == "setup" and converted.exists():
                take("setup_converted", step, converted, options.limit)
    return steps


def shown(name: str, figures: dict[str, Any]) -> str:
    if "failed" in figures:
        return f"{name:18} failed: {figures['failed']}"
    memory = f"{figures['peak_rss_gib']:8.2f} GiB resident {figures['peak_anonymous_gib']:8.2f} GiB anonymous"
    return f"{name:18} {figures['seconds']:8.2f} s {memory}"


def main() -> None:
    options = parse_options()
    if options.step:
        print(json.dumps(work(options.step, options.folder, options)))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="flashu-real-sizes-"))
    try:
        top = folder / options.preset
        top.mkdir(parents=True, exist_ok=True)
        steps = measure(top, options)
    finally:
        if not (options.folder or options.keep):
            shutil.rmtree(folder, ignore_errors=True)
    if options.keep:
        print(f"kept: {folder}")
    if options.json:
        host = describe_host() | {"cpus": os.cpu_count(), "memory_gib": memory_of_host_gib()}
        versions = {name: version(name) for name in ("torch", "huggingface_hub", "safetensors")}
        settings = {"preset": options.preset, "shard_size": options.shard_size, "prompt_tokens": PROMPT_TOKENS}
        result = {**host, **versions, **settings, "steps": steps}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if any("failed" in figures for figures in steps.values()):
        sys.exit(1)


def memory_of_host_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="show-o2-1.5b", choices=PRESETS)
    parser.add_argument("--shard-size", default="10GB", help="the most that a shard holds (default 10GB)")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="which to measure (default: all)")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are made, or are already (default: a temporary one)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the temporary folder there")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a step is given up (default 600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    parser.add_argument("--here", action="store_true", help="all steps in this process: quick, and memory says nothing")
    parser.add_argument("--step", choices=WORK, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
