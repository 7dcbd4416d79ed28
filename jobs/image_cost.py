"""What an image of a run costs in operations, from the checkpoint's small files: no weights are read."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cluster.storage import NotFound, S3Options, open_storage
from flashu.acceleration.plan import make_plan
from flashu.config import NUM_INFERENCE_STEPS
from flashu.flops import count_image
from flashu.models.checkpoint import EMBEDDED, EMBEDDED_FOLDER, read_config, resolve_folder
from flashu.models.geometry import VaeGeometry, read_json
from flashu.models.geometry import parse_size as token_grid
from flashu.models.tokenizer import PromptTokenizer
from flashu.models.wan_vae import RELEASED_FILE
from flashu.patch import Acceleration
from flashu.pipeline import tokenizer_beside
from jobs.config import RunConfig
from jobs.image_size import parse_size
from jobs.worker_model import flashu_settings

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
SMALL_FILES = (CONFIG, f"vae/{CONFIG}", TOKENIZER, f"tokenizer/{TOKENIZER}")


def tflop_per_image(config: RunConfig, prompts: Sequence[str]) -> float | None:
    """TFLOP of an image, VAE included, from a prompt as long as these are on average; a multiply-add counts as two.

    None without prompts.
    Raises `InputError`, with `CheckpointError`, or `StorageError` where the checkpoint's files cannot be had here.
    """
    if not prompts:
        return None
    sampling = config.sampling
    settings = flashu_settings(config.flashu, sampling.num_inference_steps)
    steps = settings.total_steps if settings else sampling.num_inference_steps or NUM_INFERENCE_STEPS
    with tempfile.TemporaryDirectory() as scratch:
        s3 = S3Options(config.storage.endpoint_url, config.storage.region, config.storage.path_style)
        folder = _small_files(config.model.path, s3, Path(scratch) / "model")
        network = read_config(folder / CONFIG)
        given = config.model.tokenizer and config.model.tokenizer.removesuffix(f"/{TOKENIZER}")  # may be the object
        beside = _small_files(given, s3, Path(scratch) / "tokenizer") if given else tokenizer_beside(folder, network)
        tokenizer = PromptTokenizer.from_pretrained(beside)
        vae = _vae_geometry(config.model.vae or str(folder / "vae"), s3, Path(scratch) / "vae")
    grid = token_grid(parse_size("sampling.size", sampling.size), network.native_grid)
    limit = network.max_text_tokens(grid[0] * grid[1])
    lengths = [len(tokenizer.encode_prompt(prompt, limit).prefix) for prompt in prompts]
    guidance = network.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
    if settings is None:
        plan = make_plan(None, steps, guidance)
    else:
        plan = Acceleration.of(settings, network.llm).plan(steps, guidance)
    return count_image(network, vae, plan, grid, round(sum(lengths) / len(lengths))).total / 1e12


def _vae_geometry(path: str, s3: S3Options, scratch: Path) -> VaeGeometry:
    """As `WanImageVAE.from_pretrained` finds it: in a folder's config, else the release's, which comes without one."""
    if path == EMBEDDED:
        folder = EMBEDDED_FOLDER / "vae"
    elif not path.startswith("s3://"):
        folder = Path(path).expanduser()
    elif open_storage(path, s3).exists(RELEASED_FILE):
        return VaeGeometry()
    else:
        folder = _small_files(path, s3, scratch)
    file = folder / CONFIG
    if (folder / RELEASED_FILE).exists() or not file.exists():
        return VaeGeometry()
    return VaeGeometry.from_dict(read_json(file), str(file))


def _small_files(path: str, s3: S3Options, scratch: Path) -> Path:
    """The checkpoint's folder, or one with what matters here of an s3:// one, whose weights stay where they are."""
    if not path.startswith("s3://"):
        return resolve_folder(path, SMALL_FILES)
    storage = open_storage(path, s3)
    for name in SMALL_FILES:
        file = scratch / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(NotFound):
            file.write_bytes(storage.get(name))
    return scratch
