from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from diffusers_fvg import load_embedded
from diffusers_fvg.animate.anchor import encode_anchor
from diffusers_fvg.animate.preview import LatentPreview, moving_rectangles
from diffusers_fvg.shapes.prompts import CATEGORIES, make_scene
from diffusers_fvg.shapes.world import render


class LinearVAE:
    """A latent holds the means of 2 x 2 pixels of its 8 x 8, mixed: what it shows is known exactly."""

    dtype = torch.float32
    config = SimpleNamespace(
        scale_factor_spatial=8, scale_factor_temporal=4, latents_mean=[0.1] * 48, latents_std=[0.5] * 48, z_dim=48
    )
    mix = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0]

    def encode(self, clip):
        frames = [clip[:, :, 0], *(part.mean(dim=2) for part in clip[:, :, 1:].split(4, dim=2))]
        parts = [functional.pixel_unshuffle(functional.avg_pool2d(frame, 2), 4) for frame in frames]
        latents = torch.einsum("bcfhw,cd->bdfhw", torch.stack(parts, dim=2), self.mix)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))


def test_a_linear_vae_s_latents_are_seen_as_they_are(monkeypatch):
    monkeypatch.setattr("diffusers_fvg.animate.preview.get_module_execution_device", lambda _: None)
    vae = LinearVAE()
    preview = LatentPreview(vae)
    random = torch.Generator().manual_seed(1)
    clip = functional.interpolate(torch.rand(1, 3, 3, 3, 5, generator=random), (9, 24, 40), mode="trilinear")
    seen = preview(encode_anchor(vae, clip * 2 - 1, 0))
    frames = torch.stack([clip[0, :, 0], *(part.mean(dim=1) for part in clip[0, :, 1:].split(4, dim=1))])
    expected = functional.avg_pool2d(frames, 2).permute(0, 2, 3, 1).numpy() * 255
    assert seen.shape == (3, 12, 20, 3) and seen.dtype == np.uint8
    # The ridge draws all weights a little towards 0.
    assert np.abs(seen - expected).mean() < 3


def test_the_embedded_model_s_latents_show_what_its_decoder_makes_of_them():
    pipe = load_embedded()

    def clips(seed):
        random = np.random.default_rng(seed)
        scenes = [make_scene(category, random) for category in CATEGORIES for _ in range(2)]
        return torch.from_numpy(np.stack([render(each.objects)[:5] for each in scenes])).permute(0, 4, 1, 2, 3) / 255

    preview, others = LatentPreview(pipe.vae, clips(0)), clips(1)[:4]
    with torch.no_grad():
        latents = encode_anchor(pipe.vae, others * 2 - 1, 0)
        decoded = torch.from_numpy(pipe.decode(latents))
    for video, latent in zip(decoded, latents):
        seen = preview(latent[None])
        frames = torch.stack([video[0], video[1:].mean(dim=0)]).permute(0, 3, 1, 2)
        expected = functional.avg_pool2d(frames, 2).permute(0, 2, 3, 1).numpy()
        assert seen.shape == expected.shape == (2, 32, 32, 3)
        assert np.corrcoef(seen.ravel(), expected.ravel())[0, 1] > 0.7


@pytest.mark.parametrize("spatial, temporal", [(8, 4), (16, 4)])
def test_rectangles_are_of_all_colours_and_move(spatial, temporal):
    clips = moving_rectangles(spatial, temporal)
    assert clips.shape == (4, 3, 1 + temporal, 16 * spatial, 16 * spatial)
    assert clips.min() >= 0 and clips.max() <= 1 and (clips.std(dim=(0, 2, 3, 4)) > 0.2).all()
    assert (clips[:, :, 0] != clips[:, :, -1]).float().mean() > 0.1
