"""The model that ships with the package: its folder, as it is installed."""

from dataclasses import replace

from flashu.checkpoints.files import EMBEDDED_FOLDER
from flashu.models import Showo2Qwen2_5, WanImageVAE
from flashu.models.presets import PRESETS, VAE_PRESETS


def test_folder_is_small_and_has_a_card():
    assert sum(file.stat().st_size for file in EMBEDDED_FOLDER.rglob("*") if file.is_file()) <= 24e6
    card = (EMBEDDED_FOLDER / "README.md").read_text()
    assert all(word in card for word in ("Data", "Training", "Scores", "Limits"))


def test_weights_are_of_the_preset_that_is_trained():
    model, vae = Showo2Qwen2_5.from_pretrained("embedded"), WanImageVAE.from_pretrained("embedded")
    assert model.config == PRESETS["embedded"]
    blank = VAE_PRESETS["embedded"]
    assert replace(vae.geometry, latent_mean=blank.latent_mean, latent_std=blank.latent_std) == blank
    assert 5e6 < sum(parameter.numel() for both in (model, vae) for parameter in both.parameters()) < 12e6
