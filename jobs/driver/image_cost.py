"""What an image of a run costs in operations, from the checkpoint's small files: no weights are read."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cluster.open_storage import open_storage
from cluster.storage import S3Options, StorageError
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.plan import Plan, make_plan
from flashu.checkpoints import files
from flashu.checkpoints.configs import read_config
from flashu.config import NUM_INFERENCE_STEPS, FlashUConfig
from flashu.errors import InputError
from flashu.flops import FAR, count_image, unusual_cost
from flashu.models.geometry import Showo2Config, VaeGeometry, token_grid
from flashu.tokenizer import PromptTokenizer
from jobs.settings.acceleration import flashu_settings
from jobs.settings.config import RunConfig, parse_size
from jobs.settings.inputs import small_files

MANY_IN_SHARD = 4096  # images: a shard of more is told
LONG = 10  # TFLOP: minutes on a CPU


def tflop_per_image(config: RunConfig, prompts: Sequence[str]) -> float | None:
    """TFLOP of an image, VAE included, from a prompt as long as these are on average; a multiply-add counts as two.

    None without prompts.
    Raises `InputError`, with `CheckpointError`, or `StorageError` where the checkpoint's files cannot be had here.
    """
    if not prompts:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        model = _ModelFiles(config, Path(scratch))
        given = (config.model.tokenizer or "").removesuffix(f"/{files.TOKENIZER}")  # it may be the object
        words = small_files(given, model.s3, Path(scratch) / "tokenizer") if given else None
        tokenizer = PromptTokenizer.from_pretrained(words or files.tokenizer_beside(model.folder, model.network))
    grid = token_grid(parse_size("sampling.size", config.sampling.size), model.network.native_grid)
    limit = model.network.max_text_tokens(grid[0] * grid[1])
    lengths = [len(tokenizer.encode_prompt(prompt, limit).prefix) for prompt in prompts]
    settings, steps = _settings(config)
    plan = _plan(config, model.network, settings, steps)
    return count_image(model.network, model.vae, plan, grid, round(sum(lengths) / len(lengths))).total / 1e12


def costly(config: RunConfig) -> list[str]:
    """Warnings of settings that take far more than a user may think: of the size, the steps, the images of a shard.

    Nothing is said of the size where the model's small files cannot be had here.
    """
    warnings = []
    in_shard = config.manifest.shard_size * config.sampling.num_images
    if in_shard > MANY_IN_SHARD:
        warnings.append(
            f"Warning: a shard is {in_shard:,} images, of {config.manifest.shard_size:,} prompts, which its worker "
            "holds until it has made them all; a smaller manifest.shard_size commits more often"
        )
    with suppress(InputError, StorageError), tempfile.TemporaryDirectory() as scratch:
        settings, steps = _settings(config)
        size = parse_size("sampling.size", config.sampling.size)
        if size is None and steps <= FAR * NUM_INFERENCE_STEPS:
            return warnings
        model = _ModelFiles(config, Path(scratch))
        if model.vae.z_dim != model.network.image_latent_dim:  # which is not the model's, then: that is on the nodes
            return warnings
        grid = token_grid(size, model.network.native_grid)
        cost = unusual_cost(
            model.network, model.vae, lambda number: _plan(config, model.network, settings, number), steps, grid
        )
        if cost:
            timeout = f"cluster.lease_timeout_s={config.cluster.lease_timeout_s:g}"
            hung = f". A worker whose batch takes longer than {timeout} seconds is taken for hung"
            warnings.append(f"Warning: {cost}{hung if cost.tflop > LONG else ''}")
    return warnings


class _ModelFiles:
    """What a checkpoint's small files say: its `folder`, or a copy of them, the `network` and the `vae`."""

    def __init__(self, config: RunConfig, scratch: Path):
        self.s3 = config.storage.s3
        self.folder = small_files(config.model.path, self.s3, scratch / "model")
        self.network = read_config(self.folder / files.CONFIG)
        self.vae = _vae_geometry(config.model.vae or str(self.folder / "vae"), self.s3, scratch / "vae")


def _settings(config: RunConfig) -> tuple[FlashUConfig | None, int]:
    """FlashU's settings, None for stock, and the run's inference steps."""
    settings = flashu_settings(config.flashu, config.sampling)
    return settings, settings.total_steps if settings else config.sampling.num_inference_steps or NUM_INFERENCE_STEPS


def _plan(config: RunConfig, network: Showo2Config, settings: FlashUConfig | None, steps: int) -> Plan:
    given = config.sampling.guidance_scale
    guidance = network.guidance_scale if given is None else given
    if settings is None:
        return make_plan(None, steps, guidance)
    return Acceleration.of(settings, network.llm).plan(steps, guidance)


def _vae_geometry(path: str, s3: S3Options, scratch: Path) -> VaeGeometry:
    """As `WanImageVAE.from_pretrained` finds it: in a folder's config, else the release's, which comes without one."""
    if path == files.EMBEDDED:
        folder = files.EMBEDDED_FOLDER / "vae"
    elif not path.startswith("s3://"):
        folder = Path(path).expanduser()
    elif open_storage(path, s3).exists(files.RELEASED_VAE):
        return VaeGeometry()
    else:
        folder = small_files(path, s3, scratch)
    file = folder / files.CONFIG
    if (folder / files.RELEASED_VAE).exists() or not file.exists():
        return VaeGeometry()
    return VaeGeometry.from_dict(files.read_json(file), str(file))
