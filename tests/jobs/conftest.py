"""What tests of commands share: a Ray cluster, and the S3 server that a run may write to."""

import pytest

from tests.s3_server import bucket, s3_environment, s3_server  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def cluster():
    """The setting that joins a Ray cluster of two CPUs."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield f"cluster.address={cluster.address}"
    cluster.shutdown()
