"""`flashu run` with a model that misbehaves on command: what the chaos test starts, as a user starts the real one.

What goes wrong is in the folder that CHAOS names, where workers find it whenever they started: prompts that hold RAISES
make their batch raise, always; those that hold HANGS never return, once, until there is a file `hung`; every start of a
shard is a line in `starts`; and a batch takes as many seconds more as `seconds` says, so that there is time for it.
"""

import os
import sys
import time
from pathlib import Path

from jobs.cli.main import main
from jobs.driver import run
from jobs.worker.batch_maker import BatchMaker
from jobs.worker.shard import GenerationWork

CHAOS = Path(os.environ["CHAOS"])


class ChaosWork(GenerationWork):
    def setup(self, place):
        identity = super().setup(place)
        self.maker = ChaosMaker(**vars(self.maker))
        return identity

    def process(self, lease, inputs, running):
        with (CHAOS / "starts").open("a", encoding="utf-8") as log:
            log.write(f"{time.time()} {lease.shard}\n")
        return super().process(lease, inputs, running)


class ChaosMaker(BatchMaker):
    def submit(self, prompts, *settings):
        time.sleep(float((CHAOS / "seconds").read_text()))
        if any("RAISES" in prompt for prompt in prompts):
            raise ArithmeticError("this prompt cannot be drawn")
        if any("HANGS" in prompt for prompt in prompts):
            hung = CHAOS / "hung"
            if not hung.exists():
                hung.touch()
                time.sleep(3600)
        return super().submit(prompts, *settings)


if __name__ == "__main__":
    # Workers must find this class by a name that they can import, which __main__ is not.
    from tests.jobs.driver import chaos_run

    run.GenerationWork = chaos_run.ChaosWork
    sys.argv.insert(1, "run")
    main()
