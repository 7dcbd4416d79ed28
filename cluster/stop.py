"""What a person asks of work that is under way. Apart from the pool, as not all such work needs Ray."""

from enum import IntEnum


class Stop(IntEnum):
    NO = 0
    SOON = 1  # nothing new is begun; what is in flight is finished
    NOW = 2
