"""The VAE's layout in memory, and the pixels it makes; its numbers are in test_parity.py and test_oracles.py."""

import numpy as np
import pytest
import torch
from random_weights import random_model
from torch.utils._python_dispatch import TorchDispatchMode

from flashu.models import WanImageVAE
from flashu.models.presets import VAE_PRESETS
from tests.bounds import EVALUATION
from tests.reference import relative_error

LAST = torch.channels_last


@pytest.fixture(scope="module")
def vae():
    return WanImageVAE.from_pretrained("embedded")


@pytest.fixture(scope="module")
def latents():
    return torch.randn(3, 8, 8, 10, generator=torch.Generator().manual_seed(0))


def random_vae(seed=0):
    return random_model(WanImageVAE, VAE_PRESETS["embedded"], seed)


def lies_channels_last(vae):
    weights = [parameter for parameter in vae.parameters() if parameter.ndim == 4]
    return len(weights) > 30 and all(weight.is_contiguous(memory_format=LAST) for weight in weights)


def test_weights_lie_channels_last_however_they_came(vae, tmp_path):
    """Made, loaded, loaded into, loaded with `assign`, converted, saved and loaded again."""
    made = random_vae()
    assert lies_channels_last(vae)
    assert lies_channels_last(made)
    plain = {name: value.contiguous() for name, value in random_vae(seed=1).state_dict().items()}
    for assign in (False, True):
        made.load_state_dict(plain, assign=assign)
        assert lies_channels_last(made)
    assert lies_channels_last(made.to(torch.float64).to(torch.float32))
    made.save_pretrained(tmp_path)
    loaded = WanImageVAE.from_pretrained(tmp_path)
    assert lies_channels_last(loaded)
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())


class Copies(TorchDispatchMode):
    """Counts what is copied from tensor to tensor."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.split(".")[0] in ("clone", "copy_", "_to_copy"):
            self.found.append((function.__name__, tuple(args[0].shape)))
        return function(*args, **kwargs or {})


@torch.no_grad()
def test_nothing_is_copied_on_the_way(vae, latents):
    vae.decode(latents[:1])  # which makes what is kept
    with Copies() as copies:
        image = vae.decode(latents[:1])
        vae.encode(image)
    assert copies.found == []
    assert image.is_contiguous(memory_format=LAST)


@torch.no_grad()
def test_numbers_are_those_of_the_other_layout(latents):
    first, last = random_vae().to(memory_format=torch.contiguous_format), random_vae()
    assert not lies_channels_last(first)
    assert relative_error(last.decode(latents), first.decode(latents)) < EVALUATION
    image = first.decode(latents)
    for ours, theirs in zip(last.encode(image), first.encode(image), strict=True):
        assert relative_error(ours, theirs) < EVALUATION


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels_are_those_of_every_image_by_itself(latents, dtype):
    vae = random_model(WanImageVAE, VAE_PRESETS["embedded"], 0, dtype)
    pixels = vae.decode_pixels(latents)
    assert (pixels.shape, pixels.dtype) == ((3, 64, 80, 3), torch.uint8)
    for one, found in zip(latents, pixels, strict=True):
        image = vae.decode(one[None])[0].permute(1, 2, 0).float().numpy()
        nearest = np.linspace(-1, 1, 256)[found.numpy()]
        assert np.abs(nearest - image).max() <= 1.001 / 255
        assert found.float().std() > 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_on_cuda_pixels_are_made_without_waiting_for_the_gpu(vae, latents):
    expected = vae.decode_pixels(latents)
    on_gpu, latents = WanImageVAE.from_pretrained("embedded", device="cuda"), latents.cuda()
    assert lies_channels_last(on_gpu)
    assert lies_channels_last(random_vae().cuda())
    on_gpu.decode_pixels(latents)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pixels = on_gpu.decode_pixels(latents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pixels.is_cuda
    assert (pixels.cpu().float() - expected.float()).abs().mean() < 0.5
