"""Errors whose text is written for the person who typed the input.

Whoever catches an `InputError` may print it alone, with no traceback: it says what was wrong, where, and what
would be right. Anything else that escapes is a bug and should be shown whole.
"""


class InputError(ValueError):
    """A setting, a path or a value given by the user cannot be used."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, unsafe, or belongs to another model."""


class OutOfMemoryError(RuntimeError):
    """The device ran out of memory; the text names a batch size to try next."""
