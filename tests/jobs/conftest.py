"""What tests of commands share: the S3 server that a run may write to."""

from tests.s3_server import bucket, s3_environment, s3_server  # noqa: F401 - fixtures
