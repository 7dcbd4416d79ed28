"""A worker's warm-up: afterwards no batch of its run compiles anything, and it does what it can where little goes."""

import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from graphs import graphs_compiled

from flashu import FlashUConfig, OutOfMemoryError, TextToImagePipeline, WandaScores, apply_flashu_patch
from flashu.fingerprint import fingerprint
from flashu.models.blocks import AS_THEY_ARE, Blocks
from jobs.worker.warm_up import IMAGES, BatchKinds, first_on_node, warm_up
from tests.bounds import LEVEL

SETTINGS = FlashUConfig(
    r_p=0.4, r_LS=0.4, T_LS=2, T_cache=2, tau=1, schedule=[(2, 5.0), (2, 1.0), (2, 5.0)], num_inference_steps=6
)
WORDS = ["a", "red", "circle", "above"]


def scores_of(model):
    llm = model.config.llm
    ones = ([torch.ones(width)] * llm.num_hidden_layers for width in (llm.intermediate_size, llm.hidden_size))
    return WandaScores(*ones, fingerprint(model))


@pytest.fixture
def without_fake_tensor_cache():
    """It takes longer than it saves here."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


@pytest.mark.usefixtures("without_fake_tensor_cache")
def test_no_batch_of_a_run_compiles_anything_afterwards(caplog):
    """Of one whose prompts are all alike, and of one whose prompts bring negative prompts and guidance scales. Pictures
    are those of blocks that are not compiled."""
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu", dtype="float32")
    apply_flashu_patch(pipe.model, SETTINGS, scores=scores_of(pipe.model))
    torch._dynamo.reset()
    pipe.blocks = Blocks.through(partial(torch.compile, backend="eager"))  # the compiler's front half, which decides
    rng = random.Random(0)

    def make(prompts, negative_prompts, seeds, guidance_scale):
        options = {"negative_prompts": negative_prompts, "guidance_scale": guidance_scale, "batch_size": len(prompts)}
        return pipe(prompts, seeds=seeds, **options)

    def text():
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 50)))

    def natural(images, own, alike=False, scale=5.0):
        prompts = [text()] * images if alike else [text() for _ in range(images)]
        negatives = [text() if own and rng.random() < 0.7 else "blurry" for _ in range(images)]
        make(prompts, negatives, [rng.randrange(2**32) for _ in range(images)], scale)

    for own in (False, True):
        warm_up(make, BatchKinds(5.0, "blurry", own_negatives=own, own_guidance=own), IMAGES)
        compiled = graphs_compiled()
        assert compiled > 15
        for images in (4, 3, 2, 1, 6):
            natural(images, own)
        natural(4, own, alike=True)
        natural(1, own, alike=True)
        for images in (4, 3, 2, 1) if own else ():
            natural(images, own, scale=1.0)
        assert graphs_compiled() == compiled
    assert "recompile_limit" not in caplog.text, "past it, nothing is compiled any more"

    batch = ["a red circle", "a blue square above a ring", "a star", "a ring"], [""] * 4, [1, 2, 3, 4], 5.0
    pictures = make(*batch)
    pipe.blocks = AS_THEY_ARE
    for mine, theirs in zip(pictures, make(*batch), strict=True):
        difference = np.asarray(mine, np.int16) - np.asarray(theirs, np.int16)
        assert abs(difference).max() <= LEVEL


def test_batches_become_smaller_where_memory_ends():
    tried = []

    def make(prompts, negative_prompts, seeds, guidance_scale):
        tried.append(len(prompts))
        if len(prompts) > room:
            raise OutOfMemoryError("full")

    room = 2
    warm_up(make, BatchKinds(5.0), 8)
    assert tried == [8, 4, 2, 2, 1]
    room = 0
    with pytest.raises(OutOfMemoryError, match="full"):
        warm_up(make, BatchKinds(5.0), 8)


def test_the_first_on_a_node_works_alone_and_the_others_side_by_side(tmp_path):
    entered, alone = [], threading.Event()
    together = threading.Barrier(2)

    def first():
        entered.append("first")
        alone.wait(10)
        entered.append("first is done")

    def other():
        entered.append("other")
        together.wait(10)

    kind = {"model": "a"}
    threads = [threading.Thread(target=first_on_node, args=(tmp_path, kind, work)) for work in (first, other, other)]
    threads[0].start()
    while not entered:
        threads[0].join(0.01)
    for thread in threads[1:]:
        thread.start()
    threads[1].join(0.5)
    assert entered == ["first"]
    alone.set()
    for thread in threads:
        thread.join(10)
    assert entered == ["first", "first is done", "other", "other"]
    assert not together.broken
