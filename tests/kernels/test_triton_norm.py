"""The Triton kernel of norm and SiLU against the definition in float64, and in the decoder of a VAE."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

from diffusers_fvg import kernels
from diffusers_fvg.animate import decoding
from diffusers_fvg.kernels import reference


pytest.importorskip("triton")

# (B, C, F, H, W): channels that are no power of two, pixels that end inside a tile, more than one tile.
SHAPES = [(2, 6, 3, 5, 7), (1, 24, 1, 1, 1), (1, 96, 2, 11, 9), (1, 1024, 1, 5, 7)]
LAYOUTS = {
    "packed": torch.Tensor.contiguous,
    "channels_last_3d": lambda x: x.to(memory_format=torch.channels_last_3d),
    "with gaps": lambda x: torch.cat([x, x], dim=4)[..., : x.shape[4]],
}


def make(shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(shape, generator=generator), 1 + torch.randn(shape[1], generator=generator) / 4
    # A pixel of zeros has no direction.
    features[0, :, 0, 0, 0] = 0
    return features.to(device, dtype), weight.to(device, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, layout, device, guarded):
    features, weight = make(shape, device)
    features = LAYOUTS[layout](features)
    with torch.no_grad(), kernels.use_kernels("triton"):
        assert kernels.fuses_norm(features)
        actual = kernels.rms_norm_silu(features, weight)
    assert actual.shape == features.shape
    if layout == "channels_last_3d" and shape[1] > 1:
        assert actual.is_contiguous(memory_format=torch.channels_last_3d)
    expected = reference.rms_norm_silu(features.double(), weight.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_features_are_rounded_once(dtype, device, guarded, half_bound):
    features, weight = make((2, 6, 3, 5, 7), device, dtype)
    with torch.no_grad(), kernels.use_kernels("triton"):
        actual = kernels.rms_norm_silu(features, weight)
    assert actual.dtype == dtype
    expected = reference.rms_norm_silu(features.double(), weight.double())
    torch.testing.assert_close(actual.double(), expected, rtol=half_bound[dtype], atol=1e-6)


def test_a_gradient_takes_the_definition(device):
    features, weight = make((1, 6, 1, 2, 2), device)
    with kernels.use_kernels("triton"):
        assert not kernels.fuses_norm(features)
        out = kernels.rms_norm_silu(features.requires_grad_(), weight)
    assert out.requires_grad


@pytest.mark.parametrize("is_residual", [False, True])
def test_a_decoder_takes_it_and_is_as_it_was_afterwards(is_residual, device, monkeypatch):
    config = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    if is_residual:
        config |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 4}
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config).eval().to(device)
    latents = torch.randn(1, 16, 3, 2, 3, generator=torch.Generator().manual_seed(0)).to(device)
    calls, inner = [], reference.rms_norm_silu
    monkeypatch.setattr(reference, "rms_norm_silu", lambda *args: calls.append(args) or inner(*args))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        norms = [norm for norm in vae.decoder.modules() if isinstance(norm, WanRMS_norm)]
        stock, counts = WanRMS_norm.forward, []
        monkeypatch.setattr(WanRMS_norm, "forward", lambda self, x: counts.append(self) or stock(self, x))
        with kernels.use_kernels("triton"):
            frames = torch.cat(list(decoding.decode_chunks(vae, latents, lambda pixels: pixels)), dim=2)
    torch.testing.assert_close(frames, expected, rtol=1e-4, atol=1e-4)
    # The norm before attention alone, once a latent frame, is a module's.
    assert len(counts) == 3 * sum(norm.gamma.ndim == 3 for norm in norms) and not calls
    assert not any("forward" in module.__dict__ for module in vae.modules())
