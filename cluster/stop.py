"""What a person asks of work that is under way. Apart from the pool, as not all such work needs Ray."""

from enum import IntEnum


class Stop(IntEnum):
    """How much of the work is to go on.

    NO: all of it.
    SOON: nothing new is begun; what is in flight is finished.
    NOW: nothing.
    """

    NO = 0
    SOON = 1
    NOW = 2
