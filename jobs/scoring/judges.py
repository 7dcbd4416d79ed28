"""Who answers questions about pictures: the interface of a judge, and how its answers are read.

`open_judge` has one by its name.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL import Image

from cluster.tracebacks import describe
from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError


class Judge(ABC):
    """Answers yes-or-no questions about pictures."""

    identity: str  # tells it from others: what answers, by which weights
    at_once: int  # questions to begin with in a call; fewer where memory is short

    @abstractmethod
    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """The answer to each question about the picture beside it, as the model words it; `verdict` reads it.

        A picture with several questions stands beside each of them, in a row.
        """


def verdict(answer: str) -> bool | None:
    """Whether an answer is a yes or a no, by its first word; None where that is neither.

    "yes", "Yes." and "**Yes**, it is" are a yes, "No, it is blue" is a no. "The dog is red" is neither.
    """
    first = re.search(r"[^\W_]+", answer)
    return {"yes": True, "no": False}.get(first[0].casefold()) if first else None


def unusable(name: str, extra: str, error: Exception) -> Exception:
    """What to raise where another library raised `error` over a judge: `InputError`, with the reason in a sentence.

    An error that is the device's, or an `InputError`, is returned as it is.
    """
    if isinstance(error, InputError) or is_device_error(error) or is_out_of_memory(error):
        return error
    text = describe(error)
    reason = re.split(r"(?<=[.!])\s", text)[0][:300]
    if isinstance(error, ImportError) or "Missing optional dependencies" in text or "No module named" in text:
        return InputError(f"{name} needs a package that is not installed: {reason} (pip install 'flashu[{extra}]')")
    return InputError(f"{name} cannot be used as a judge: {reason}")
