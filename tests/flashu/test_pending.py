"""Pictures that are waited for later: the same ones as those of a plain call."""

import copy

import numpy as np
import pytest
import torch

from flashu import InputError, TextToImagePipeline
from tests.bounds import LEVEL

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
        assert len(pending) == 2
        for made, one in zip(pending.pictures(), expected, strict=True):
            assert np.abs(np.asarray(made, int) - np.asarray(one, int)).max() <= LEVEL
            assert made.info == one.info
            assert made.size == (64, 32)
        assert 0 < pending.wait() < 60


def test_what_cannot_be_made_is_said_when_it_is_submitted(pipe):
    with pytest.raises(InputError, match="multiple of 16"):
        pipe.submit("a red circle", size=30)


@pytest.mark.parametrize("ahead", [0, 1])
def test_pictures_begun_before_a_batch_that_fails_are_not_lost(pipe, ahead, monkeypatch):
    """Of the first two batches of three, whether or not one is begun before the one before is waited for."""
    monkeypatch.setattr("flashu.generation._batches_ahead", lambda device: ahead)
    whole = pipe(["a"] * 6, num_inference_steps=2, seeds=0)
    calls = []
    pipe.model.time_embed.register_forward_hook(lambda *_: calls.append(1) or ((len(calls) < 3 or 1 / 0) and None))
    made = []
    with pytest.raises(ZeroDivisionError):
        made.extend(pipe.stream(["a"] * 6, batch_size=2, num_inference_steps=2, seeds=0))
    assert [picture.info["seed"] for picture in made] == [0, 1, 2, 3]
    for one, same in zip(made, whole, strict=False):
        assert np.abs(np.asarray(one, int) - np.asarray(same, int)).max() <= LEVEL


def test_a_batch_of_nothing_is_refused(pipe):
    with pytest.raises(InputError, match="prompts is empty"):
        pipe.submit([])


def test_the_pipelines_own_vae_decodes(pipe):
    """Also one that it was given later."""
    before, vae = pipe("a red circle", **OPTIONS | {"seeds": 1})[0], pipe.vae
    pipe.vae = copy.deepcopy(vae)
    with torch.no_grad():
        pipe.vae.decoder.head[-1].bias.add_(0.5)
    assert np.asarray(pipe("a red circle", **OPTIONS | {"seeds": 1})[0]).mean() > np.asarray(before).mean() + 20
