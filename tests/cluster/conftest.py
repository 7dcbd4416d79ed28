"""The S3 server that tests of storage talk to."""

from tests.s3_server import bucket, fault_proxy, s3_environment, s3_server  # noqa: F401 - fixtures
