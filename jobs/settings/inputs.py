"""Whether what a run loads is there: model, VAE, tokenizer, scores, CLIP checkpoint. Looked at before Ray is started.
And how workers take such paths, which run in another folder; and the manifest that the settings name.

With Ray on this machine, what is not here is an error. A cluster's nodes may have what this machine has not (a disk of
their own, a way to the hub), so there it is a warning, and the first worker finds out. Torch is not imported, and no
weights are read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from cluster.open_storage import open_storage
from cluster.session import ADDRESS_VARIABLE, LOCAL
from cluster.storage import NotFound, S3Options, Storage, StorageError
from flashu.checkpoints import files
from flashu.checkpoints.configs import read_config
from flashu.checkpoints.hub import HUB_ID, resolve_folder
from flashu.checkpoints.weight_names import STEMS, find_weights
from flashu.errors import InputError
from flashu.models.geometry import Showo2Config, unsuited_size
from flashu.tokenizer import PromptTokenizer
from jobs.dataset.keys import RUN
from jobs.settings.config import ModelSection, RunConfig
from manifests import DEMO
from manifests.plan import Manifest

SMALL_FILES = (files.CONFIG, f"vae/{files.CONFIG}", files.TOKENIZER, f"tokenizer/{files.TOKENIZER}")
S3 = "s3://"
MANY, SOME = 10_000, 100  # objects of an s3:// checkpoint that are looked at
FORMS = "give a folder, a hub id (OWNER/NAME) or an s3:// folder"

Found = TypeVar("Found")


def is_on_cluster(address: str | None) -> bool:
    """Whether a run with this cluster.address joins a cluster that was named, here or around this process."""
    return (address or os.environ.get(ADDRESS_VARIABLE) or LOCAL) != LOCAL


def check_inputs(config: RunConfig, *, remote: bool = True) -> list[str]:
    """Warnings. Raises `InputError`, `StorageError` for what is not there, or is not what it should be.

    remote: whether to look at S3 and the hub too.
    """
    checks = _InputChecks(config, remote)
    network = checks.at_model(config.model)
    if network and config.sampling.size is None:
        unsuited = unsuited_size(config.model.path, network.native_grid)
        checks.warnings += [f"Warning: sampling.size is not set. {unsuited}"] if unsuited else []
    if config.flashu.scores:
        checks.at("flashu.scores", config.flashu.scores, checks.scores)
    if config.quality.enabled and config.quality.clip:
        checks.at("quality.clip", config.quality.clip, checks.transformers_folder)
    return checks.warnings


def check_at_once(config: RunConfig) -> None:
    """As `check_inputs`, of what needs no connection: for where torch is not imported yet, which takes seconds.

    A run that has begun may be complete, and then needs nothing of this: its start finds out.
    """
    output = config.output.path
    if "://" not in output and not _is_local(f"{output}/{RUN}"):
        check_inputs(config, remote=False)


def check_model(model: ModelSection, config: RunConfig) -> list[str]:
    """As `check_inputs`, of a model alone, which need not be the config's own."""
    checks = _InputChecks(config)
    checks.at_model(model)
    return checks.warnings


def check_transformers(name: str, path: str, config: RunConfig) -> list[str]:
    """As `check_inputs`, of a checkpoint in transformers' layout; `name` begins what is said of it."""
    checks = _InputChecks(config)
    checks.at(name, path, checks.transformers_folder)
    return checks.warnings


def small_files(path: str, s3: S3Options, scratch: Path) -> Path:
    """A checkpoint's folder, or one with its `SMALL_FILES` of an s3:// one, whose weights stay where they are.

    Where these hold no tokenizer, with the files of one in another layout.
    """
    if not path.startswith(S3):
        return resolve_folder(path, (*SMALL_FILES, *files.TOKENIZER_FILES))
    storage = open_storage(path, s3)
    _copy(storage, SMALL_FILES, scratch)
    if files.find_tokenizer(scratch) is None:
        _copy(storage, files.TOKENIZER_FILES, scratch)
    return scratch


def _copy(storage: Storage, names: Iterable[str], folder: Path) -> None:
    """Fetch those of the objects that are there."""
    for name in names:
        with suppress(NotFound):
            data = storage.get(name)
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


class _InputChecks:
    """Checks one input after the other; what may be elsewhere becomes a warning."""

    def __init__(self, config: RunConfig, remote: bool = True):
        self.address, self.remote = config.cluster.address, remote
        self.s3 = config.storage.s3
        self.on_cluster = is_on_cluster(self.address)
        self.warnings: list[str] = []
        self.storages: dict[str, Storage] = {}

    def at(self, name: str, path: str, look: Callable[[str], Found]) -> Found | None:
        """What `look` makes of the setting's path; None where nothing can be said here."""
        is_local = _is_local(path)
        if not is_local and not self.remote and (path.startswith(S3) or _is_hub_id(path)):
            return None
        scheme, separator, _ = path.partition("://")
        if separator and scheme != "s3":
            raise InputError(f"{name} cannot be read from {scheme}://; {FORMS}")
        try:
            return look(path)
        except (InputError, StorageError) as error:
            text = f"{name}: {error}"
            if str(error).startswith("no such"):
                text += f"; {FORMS}"
            absolute = not separator and os.path.isabs(os.path.expanduser(path))
            elsewhere = isinstance(error, StorageError) or absolute or (not is_local and _is_hub_id(path))
            if self.on_cluster and elsewhere:
                self.warnings.append(f"Warning: {text}. That is on this machine; workers look on their nodes")
                return None
            if absolute and self.address is None:
                text += ". If the nodes of a cluster have it, name the cluster, as in cluster.address=auto"
            raise type(error)(text) from None

    def at_model(self, model: ModelSection) -> Showo2Config | None:
        """What the model's config says, where it can be had here."""
        with tempfile.TemporaryDirectory() as scratch:
            found = self.at("model.path", model.path, lambda path: self.model(path, Path(scratch), model.variant))
            vae, tokenizer = model.vae, model.tokenizer
            if vae:
                self.at("model.vae", vae, self.vae)
            elif found and not self._has_vae_in_s3(model.path):
                beside = files.vae_beside(found[0])
                name = "model.vae is not set, and the model has none beside it"
                self.at(name if isinstance(beside, str) else "model.path", str(beside), self.vae)
            if tokenizer:
                self.at("model.tokenizer", tokenizer, self.tokenizer)
            elif found:
                try:
                    beside = files.tokenizer_beside(*found)
                except InputError:
                    raise InputError(
                        f"{model.path} has no tokenizer, and names none; set model.tokenizer ({FORMS})"
                    ) from None
                if beside != found[0]:
                    self.at("model.tokenizer is not set, and the model has none beside it", str(beside), self.tokenizer)
        return found and found[1]

    def model(self, path: str, scratch: Path, variant: str | None) -> tuple[Path, Showo2Config]:
        """A folder with the checkpoint's small files, and its config."""
        if path.startswith(S3):
            self._require(path, [files.CONFIG])
            find_weights(self._names(path), path, variant)
        folder = small_files(path, self.s3, scratch)
        if not (folder / files.CONFIG).exists():
            raise InputError(f"{path} has no {files.CONFIG}; it is not a Show-o2 checkpoint folder")
        try:
            network = read_config(folder / files.CONFIG)
        except InputError as error:
            raise type(error)(str(error).replace(str(scratch), path.rstrip("/"))) from None
        if _is_local(path):
            files.weight_files(folder, variant)
        return folder, network

    def scores(self, path: str) -> None:
        self.file(path)
        if path.startswith(S3):
            return
        try:
            with safe_open(Path(path).expanduser(), framework="np") as opened:
                known = "flashu" in (opened.metadata() or {})
        except (SafetensorError, OSError):
            known = False
        if not known:
            raise InputError(f"{path} is not a file of Wanda scores (flashu calibrate makes them)")

    def vae(self, path: str) -> None:
        if path.startswith(S3):
            if not self._exists(path, files.RELEASED_VAE) and not self._is_object(path):
                find_weights(self._names(path), path)
        elif path != files.EMBEDDED and not _is_file(path):
            folder = resolve_folder(path, [files.CONFIG])
            if _is_local(path):
                files.vae_files(folder)

    def tokenizer(self, path: str) -> None:
        if path.startswith(S3):
            if not any(all(self._exists(path, name) for name in names) for names in files.TOKENIZER_LAYOUTS):
                names = [files.TOKENIZER, f"tokenizer/{files.TOKENIZER}"]
                self._require(path, names, or_itself=path.endswith(f"/{files.TOKENIZER}"))
            return
        if Path(path).name == files.TOKENIZER:
            self.file(path)
        PromptTokenizer.from_pretrained(path)

    def transformers_folder(self, path: str) -> None:
        if path.startswith(S3):
            self._require(path, [files.CONFIG])
        elif not (resolve_folder(path, [files.CONFIG]) / files.CONFIG).exists():
            raise InputError(f"{path} has no {files.CONFIG}; it is no checkpoint of transformers")

    def file(self, path: str) -> None:
        if path.startswith(S3):
            self._require(path, [], or_itself=True)
        elif not _is_file(path):
            raise InputError(f"{path} is a folder; give a file" if _is_local(path) else f"there is no file {path}")

    def _require(self, path: str, names: list[str] | tuple[str, ...], or_itself: bool = False) -> None:
        """Raises `InputError` unless the s3:// folder holds one of the names, or the path is an object."""
        if any(self._exists(path, name) for name in names):
            return
        if or_itself and self._is_object(path):
            return
        what = f"holds none of {', '.join(names)}" if names else "is not there"
        raise InputError(f"{path} {what}")

    def _has_vae_in_s3(self, path: str) -> bool:
        """Whether there is one beside an s3:// model, of which `small_files` need not have a copy."""
        if not path.startswith(S3):
            return False
        return self._exists(path, files.RELEASED_VAE) or bool(self._names(f"{path.rstrip('/')}/vae"))

    def _is_object(self, path: str) -> bool:
        parent, _, name = path.rstrip("/").rpartition("/")
        return parent not in ("s3:/", "s3:") and self._exists(parent, name)

    def _exists(self, path: str, name: str) -> bool:
        return self._storage(path).exists(name)

    def _names(self, path: str) -> list[str]:
        """What an s3:// folder holds itself: all that may be weights, and some of what else there is."""
        storage = self._storage(path)
        keys = {key for stem in STEMS for key in islice(storage.list(stem), MANY)} | set(islice(storage.list(), SOME))
        return [key for key in keys if "/" not in key]

    def _storage(self, path: str) -> Storage:
        if path not in self.storages:  # which take a while to open
            self.storages[path] = open_storage(path, self.s3)
        return self.storages[path]


def _is_local(path: str) -> bool:
    """Whether it is the path of something on this machine."""
    return path == files.EMBEDDED or local(path) is not None


def _is_file(path: str) -> bool:
    return _is_local(path) and path != files.EMBEDDED and Path(path).expanduser().is_file()


def _is_hub_id(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not path.startswith(".")


def local(path: str) -> Path | None:
    """The path, if there is something there on this machine."""
    try:
        found = None if "://" in path else Path(path).expanduser()
        return found if found and found.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a path; no such home; a null character
        return None


def absolute(path: str | None) -> str | None:
    """A path that means something here, made absolute; anything else as it is."""
    return os.path.abspath(local(path)) if path and local(path) else path


def absolute_model(model: Mapping[str, Any]) -> ModelSection:
    """The model section of a config, or of a run.json, likewise."""
    return ModelSection(**model | {name: absolute(model[name]) for name in ("path", "vae", "tokenizer")})


def open_manifest(config: RunConfig) -> Manifest:
    """The run's prompts. Raises `ManifestError`."""
    return Manifest.open(
        str(DEMO) if config.manifest.path == "demo" else config.manifest.path,
        shard_size=config.manifest.shard_size,
        limit=config.manifest.limit,
        columns=config.manifest.columns,
        endpoint_url=config.storage.endpoint_url,
        region=config.storage.region,
    )


def prompts_of(manifest: Manifest) -> Iterator[str]:
    """The prompts in order, those that are empty aside."""
    for _, rows in manifest.batches(["prompt"]):
        yield from filter(None, rows["prompt"].to_pylist())
