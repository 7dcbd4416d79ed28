"""Pictures that are waited for later: the same ones as those of a plain call."""

import numpy as np
import pytest
import torch

from flashu import InputError, TextToImagePipeline

PROMPTS = ["a red circle", "two blue squares beside a ring"]
OPTIONS = {"seeds": [1, 2], "num_inference_steps": 4, "size": (32, 64)}


def devices():
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=devices())
def pipe(request):
    return TextToImagePipeline.from_pretrained("embedded", device=request.param, dtype="float32")


def test_batches_submitted_one_after_the_other_are_those_of_plain_calls(pipe):
    plain = pipe(PROMPTS, **OPTIONS)
    first, second = pipe.submit(PROMPTS, **OPTIONS), pipe.submit(PROMPTS[::-1], **OPTIONS)
    others = pipe(PROMPTS[::-1], **OPTIONS)
    for pending, expected in ((second, others), (first, plain)):
        assert (len(pending), pending.size) == (2, (32, 64))
        for made, one in zip(pending.pictures(), expected, strict=True):
            assert np.abs(np.asarray(made, int) - np.asarray(one, int)).max() <= 1
            assert made.info == one.info
            assert made.size == (64, 32)
        assert 0 < pending.seconds < 60


def test_what_cannot_be_made_is_said_when_it_is_submitted(pipe):
    with pytest.raises(InputError, match="multiple of 16"):
        pipe.submit("a red circle", size=30)


def test_pictures_begun_before_a_batch_that_fails_are_not_lost(pipe):
    pictures = pipe.stream(["a"] * 4, batch_size=2, num_inference_steps=2, seeds=0)
    made = [next(pictures)]
    pipe.model.time_embed.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.extend(pictures)
    assert len(made) >= 2
