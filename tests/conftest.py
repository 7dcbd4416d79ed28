"""Options and fixtures that every test folder may use."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

# The models here are tiny: threads waiting for each other cost more than they bring, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray has its workers stand back for whatever else runs: beside another process of tests, one takes a minute to start.
os.environ.setdefault("RAY_worker_niceness", "0")
# Over a hundred processes that tests start import the same modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

LONGEST = (
    "test_chaos.py",
    "test_benchmark.py",
    "test_run.py",
    "test_pool.py",
    "test_submit.py",
    "test_ray_tokens.py",
    "test_warm_up.py",
    "test_commands.py",
    "test_scheduler.py",
    "test_gpu_benchmark.py",
)
GOLDEN = Path(__file__).parent / "golden"

LIGHT = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
"""For a head of `ray.cluster_utils.Cluster`: fewer processes, which take seconds to start."""


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        metavar="DIR",
        help="a folder of reference numbers, or of such folders; may be repeated (default: tests/golden)",
    )


def pytest_configure(config):
    """Each process of tests has a folder of its own for Ray, whose clusters are found by a file there."""
    folder = tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    )  # sockets want short names
    os.environ["RAY_TMPDIR"] = folder.name
    config.add_cleanup(folder.cleanup)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported here stays to the end: to look through it for garbage, again and again, takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Over several processes (`pytest -n 3`), the tests of a file stay together, as what they share is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid.split("::")[0]

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)  # first, so that no process is left with one at the end


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The setting that joins a Ray cluster of two CPUs, whose workers may use the tests' S3 server."""
    from ray.cluster_utils import Cluster

    from tests.s3_server import set_s3_environment

    with pytest.MonkeyPatch.context() as patch:
        set_s3_environment(patch, tmp_path_factory)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2} | LIGHT)
    yield f"cluster.address={cluster.address}"
    cluster.shutdown()


def pytest_generate_tests(metafunc):
    """`golden_model` and `golden_vae` run once for every reference folder of their kind."""
    for fixture, marker in (("golden_model", "noise"), ("golden_vae", "latents")):
        if fixture in metafunc.fixturenames:
            folders = golden_folders(metafunc.config, marker)
            metafunc.parametrize(fixture, folders, ids=lambda folder: folder.name, scope="module")


def golden_folders(config, tensor):
    """The reference folders that were asked for and hold `tensor`."""
    given = config.getoption("--golden") or [GOLDEN]
    folders = [meta.parent for top in given for meta in sorted(top.glob("**/meta.json"))]
    if not folders:
        raise SystemExit(f"no reference folders (with a meta.json) under {', '.join(map(str, given))}")
    return [folder for folder in folders if _holds(folder, tensor)]


def _holds(folder, tensor):
    from safetensors import safe_open

    with safe_open(folder / "expected.safetensors", framework="pt") as opened:
        return tensor in set(opened.keys())
