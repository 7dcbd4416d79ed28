"""Work whose workers are never set up, without what takes long to import: for tests of what a run says of it."""

import os

from cluster.work import SetupError


class NoModel:
    """Raises what is final: no other worker would fare better."""

    def __init__(self, *_):
        pass

    def setup(self, place):
        raise SetupError("there is no model here")


class CannotSetUp(NoModel):
    """Raises what is tried again elsewhere, with secrets in it."""

    def setup(self, place):
        secret = os.environ["AWS_SECRET_ACCESS_KEY"]
        raise RuntimeError(f"no kernel image for s3://user:pass@host/ with {secret}")
