"""What tests of commands share: a Ray cluster, and the S3 server that a run may write to."""

import pytest

from tests.conftest import LIGHT
from tests.s3_server import bucket, s3_environment, s3_server, set_s3_environment  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The setting that joins a Ray cluster of two CPUs, whose workers may use the S3 server."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        set_s3_environment(patch, tmp_path_factory)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2} | LIGHT)
    yield f"cluster.address={cluster.address}"
    cluster.shutdown()
