"""The light decoder against numbers of taehv's own code, from files and the Hub, and in the pipeline."""

import functools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_vae
from tiny_animators import wan21_i2v
from tiny_cogvideox import tiny_cogvideox_pipeline

from diffusers_fvg import FactorizedImageToVideoPipeline, LightDecoder, decode_frames, replay
from diffusers_fvg.animate.decoding import decode_video, to_uint8
from diffusers_fvg.animate.light_decoder import FILES


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
from harness import LiveBytes  # noqa: E402


# Four pixels, and the mean of each frame of the second video, of `TAEHV.decode_video(latents, parallel=True)` in
# https://github.com/madebyollin/taehv, commit 1f14a56, in float64 with the weights and latents below; converted from [0, 1] to
# [-1, 1].
REFERENCE = {
    "taew2_1": (
        [-0.504425248, -0.414973136, -0.115100403, -0.494352868],
        [-0.341352809, -0.342491737, -0.341316214, -0.342245669, -0.34134968],
    ),
    "taew2_2": (
        [-0.504419621, -0.136078377, 0.029037747, 0.237033427],
        [-0.081046355, -0.080955933, -0.081038724, -0.080985018, -0.081047963],
    ),
}


@functools.cache
def weights(name: str) -> dict[str, torch.Tensor]:
    """Weights by a formula, with which pixels are seldom black or white."""
    with torch.device("meta"):
        shapes = sorted((key, weight.shape) for key, weight in LightDecoder(name).state_dict().items())
    found = {}
    for place, (key, shape) in enumerate(shapes):
        wave = torch.sin(0.73 * torch.arange(shape.numel(), dtype=torch.float64) + place).view(shape)
        found[key] = wave * (math.sqrt(3 / shape[1:].numel()) if len(shape) > 1 else 1 / 4)
    found["decoder.22.weight"] /= 4
    found["decoder.22.bias"] += 0.5
    return found


def made(name: str, dtype: torch.dtype) -> LightDecoder:
    with torch.device("meta"):
        decoder = LightDecoder(name)
    decoder.load_state_dict({key: weight.to(dtype) for key, weight in weights(name).items()}, assign=True)
    return decoder.eval().requires_grad_(False)


def waves(channels: int) -> torch.Tensor:
    """Latents of two videos with two latent frames of 1 x 2."""
    shape = (2, channels, 2, 1, 2)
    return 2 * torch.sin(0.9 * torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)


@pytest.fixture(scope="module")
def decoder():
    return made("taew2_1", torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file like the published ones: float16, with an encoder."""
    folder = tmp_path_factory.mktemp("light")
    tensors = {name: weight.half() for name, weight in weights("taew2_1").items()}
    save_file(tensors | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}, folder / "taew2_1.safetensors")
    return folder


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_the_published_code(name):
    channels, patch_size = FILES[name]
    pixels = made(name, torch.float64)(waves(channels))
    assert pixels.shape == (2, 3, 5, 8 * patch_size, 16 * patch_size)
    found = [pixels[0, 0, 0, 0, 0], pixels[0, 1, 0, 5, 7], pixels[1, 2, 2, 3, 9], pixels[1, 0, 4, -1, -1]]
    torch.testing.assert_close([value.item() for value in found], REFERENCE[name][0], rtol=0, atol=1e-9)
    means = pixels[1].mean(dim=(0, 2, 3)).tolist()
    torch.testing.assert_close(means, REFERENCE[name][1], rtol=0, atol=1e-9)


def test_pixels_are_limited_and_must_be_finite(decoder):
    # The bound of latents, 3, is within the decoder.
    latents = torch.full((1, 16, 1, 1, 1), 1e4)
    assert torch.equal(decoder(latents), decoder(latents / 100))
    offset = decoder.decoder[22].bias.data.clone()
    decoder.decoder[22].bias.data += torch.tensor([5.0, -5.0, 0.0])
    pixels = decoder(latents)
    assert (pixels[:, 0] == 1).all() and (pixels[:, 1] == -1).all() and (pixels[:, 2].abs() < 1).all()
    decoder.decoder[22].bias.data += math.inf
    with pytest.raises(FloatingPointError, match="Stage `decode` made values that are not finite"):
        decoder(latents)
    decoder.decoder[22].bias.data.copy_(offset)


@torch.no_grad()
def test_it_decodes_where_a_vae_does(decoder):
    latents = waves(16).float()
    expected = to_uint8(decoder(latents)).permute(0, 2, 3, 4, 1).numpy()
    np.testing.assert_array_equal(decode_video(decoder, latents, "uint8"), expected)
    np.testing.assert_array_equal(np.stack(list(decode_frames(decoder, latents[1:]))), expected[1])
    with pytest.raises(ValueError, match=r"of shape \(1, 16, any, any, any\), but is .*\(1, 48, 2, 1, 2\)"):
        next(decode_frames(decoder, waves(48).float()[:1]))
    # The memory does not grow with the length of the video.
    peaks = []
    for length in (2, 3):
        clip = latents[:1, :, :1].repeat(1, 1, length, 1, 1)
        with LiveBytes([*decoder.parameters(), clip]) as live:
            for _ in decoder.frames(clip):
                pass
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("place", [("taew2_1.safetensors",), ("", "taew2_1.safetensors", "float32")])
def test_a_file_is_loaded(place, folder):
    loaded = LightDecoder.from_pretrained(folder / place[0], *place[1:])
    assert loaded.dtype == torch.float32 and loaded.config.name == "taew2_1"
    wanted = weights("taew2_1")
    assert all(torch.equal(weight, wanted[name].half().float()) for name, weight in loaded.state_dict().items())


def test_a_file_of_a_repository_is_loaded(folder, hub):
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("org/light")
    api.upload_folder(repo_id="org/light", folder_path=folder)
    loaded = LightDecoder.from_pretrained("org/light", "taew2_1.safetensors", torch.float16)
    assert loaded.dtype == torch.float16 and loaded.config.z_dim == 16
    with pytest.raises(
        OSError, match="org/light on the Hub, which cannot be loaded: it has no file taew2_2.safetensors"
    ):
        LightDecoder.from_pretrained("org/light", "taew2_2.safetensors")
    with pytest.raises(
        ValueError, match="Name the file in the folder or repository 'org/light' by `weight_name`: taew2_1 is for"
    ):
        LightDecoder.from_pretrained("org/light")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taehv.safetensors", r"taehv.safetensors is not a light decoder of Wan: the name must begin with taew2_1"),
        ("lighttaew2_1.safetensors", r"lighttaew2_1.safetensors is not .* need latents that are not normalised"),
        (
            "taew2_2.safetensors",
            r"of taew2_2. decoder.1.weight: \(256, 16, 3, 3\), not \(256, 48, 3, 3\); decoder.22.bias",
        ),
        ("taew2_1.pth", r"taew2_1.pth'\] would be read as pickles"),
        ("taew2_1.txt", "taew2_1.txt is not a safetensors file"),
    ],
)
def test_other_files_are_refused(name, message, folder, tmp_path):
    is_text = name.endswith(".txt")
    (tmp_path / name).write_bytes(b"text" if is_text else (folder / "taew2_1.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        LightDecoder.from_pretrained(tmp_path / name)


def test_missing_weights_and_files_are_refused(folder, tmp_path):
    save_file({"decoder.1.weight": torch.zeros(256, 16, 3, 3)}, tmp_path / "taew2_1.safetensors")
    with pytest.raises(
        ValueError, match=r"does not have the weights of taew2_1. decoder.1.bias: missing, not \(256,\)"
    ):
        LightDecoder.from_pretrained(tmp_path / "taew2_1.safetensors")
    with pytest.raises(ValueError, match="`name` is 'taehv': use taew2_1 or taew2_2"):
        LightDecoder("taehv")


@pytest.mark.parametrize(
    ("source", "weight_name", "dtype", "message"),
    [
        ("absent.safetensors", None, "float32", r"There is no file '.*absent\.safetensors'\.$"),
        ("", None, "float32", "Name the file in the folder or repository .* by `weight_name`: taew2_1 is for"),
        ("", "taew2_2.safetensors", "float32", r"There is no file 'taew2_2\.safetensors' in "),
        (
            "absent",
            "taew2_1.safetensors",
            "float32",
            "absent' is neither an existing file or folder nor the name of a rep",
        ),
        ("", "../taew2_1.safetensors", "float32", "does not stay in its folder"),
        ("taew2_1.safetensors", "taew2_1.safetensors", "float32", "is a file: leave out `weight_name`"),
        ("taew2_1.safetensors", None, "int8", "`dtype='int8'` must be torch.bfloat16"),
    ],
)
def test_wrong_arguments_are_refused(source, weight_name, dtype, message, folder):
    with pytest.raises(ValueError, match=message):
        LightDecoder.from_pretrained(folder / source, weight_name, dtype)


def test_a_pipeline_decodes_with_it(decoder, monkeypatch, caplog):
    pipe = tiny_pipeline(rewriter=None, composer=None)
    pipe.set_progress_bar_config(disable=True)
    call = {"mode": "direct", "height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 1, "generator": 0}
    latents = pipe("a red circle", output_type="latent", **call).frames
    pipe.light_decoder = decoder
    monkeypatch.setattr(type(pipe.vae.decoder), "forward", None)
    out = pipe("a red circle", output_type="pt", **call)
    assert torch.equal(out.frames, decoder(latents).transpose(1, 2) * 0.5 + 0.5)
    assert out.records[0]["light_decoder"] == "taew2_1"
    # A pipeline from the same components decodes with it too, but not with another VAE.
    assert type(pipe).from_pipe(pipe).light_decoder is decoder
    assert type(pipe).from_pipe(pipe, vae=tiny_vae()).light_decoder is None
    pipe.light_decoder = None
    monkeypatch.undo()
    replay(pipe, out.records[0])
    assert "light_decoder 'taew2_1', here None" in caplog.text


@pytest.mark.parametrize(
    ("light_decoder", "message"),
    [
        (tiny_vae, "`light_decoder` is a AutoencoderKLWan: make one with"),
        (
            lambda: made("taew2_2", torch.float16),
            r"`light_decoder` is taew2_2, which does not decode .* \(`z_dim` 16, `patch_size` None\)",
        ),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(light_decoder, message):
    pipe = tiny_pipeline(rewriter=None, composer=None)
    with pytest.raises(ValueError, match=message):
        pipe.light_decoder = light_decoder()
    assert pipe.light_decoder is None


@pytest.mark.parametrize(
    "make", [tiny_cogvideox_pipeline, lambda: FactorizedImageToVideoPipeline.from_pipe(wan21_i2v())]
)
def test_pipelines_of_other_models_refuse_it(make, decoder):
    pipe = make()
    with pytest.raises(ValueError, match=f"{type(pipe).__name__} always decodes with its own VAE"):
        pipe.light_decoder = decoder
    assert pipe.light_decoder is None
