"""`--quantize`, `--compile` and `--light-decoder` through the command line: what the record says, what is made, and what is
refused."""

import importlib.util
import json

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_transformer
from tiny_animators import tiny_animator

from diffusers_fvg import LightDecoder
from diffusers_fvg.cli import main
from diffusers_fvg.media import read_video, read_video_metadata


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture and two models, one an image-to-video pipeline of diffusers."""
    folder = tmp_path_factory.mktemp("models")
    PIL.Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    # Wide enough for the packages that quantize.
    wide = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 64}
    transformer = tiny_transformer(anchored=True, **wide)
    tiny_pipeline(transformer=transformer, rewriter=None, composer=None).save_pretrained(folder / "wan")
    tiny_animator("wan22_ti2v").save_pretrained(folder / "i2v")
    return folder


def generate(folder, model: str, *more: str) -> int:
    size = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "1"]
    size += ["--seed", "1", "--dtype", "float32"]
    paths = ["--model", str(folder / model), "--image", str(folder / "a.png"), "--output", str(folder / "a.mp4")]
    return main(["generate", "a red circle", *paths, *size, "--device", "cpu", "--quiet", "--overwrite", *more])


def made(folder) -> tuple[np.ndarray, dict]:
    return read_video(folder / "a.mp4")[0].astype(float), read_video_metadata(folder / "a.mp4")


@pytest.mark.parametrize("model", ["wan", "i2v"])
@pytest.mark.parametrize(("kind", "told"), [("fp8", "float8_e4m3fn"), ("int8", "torchao")])
def test_weights_in_fewer_bits(model, kind, told, folder, capsys):
    if kind == "int8" and importlib.util.find_spec("torchao") is None:
        assert generate(folder, model, "--quantize", kind) == 2
        assert (
            "--quantize int8 needs the package torchao; install it with `pip install torchao`"
            in capsys.readouterr().err
        )
        pytest.skip("needs the package torchao")
    assert generate(folder, model) == 0, capsys.readouterr().err
    plain, record = made(folder)
    assert not record["quantization"]
    assert generate(folder, model, "--quantize", kind) == 0, capsys.readouterr().err
    frames, record = made(folder)
    assert list(record["quantization"].values()) == [told]
    assert frames.shape == plain.shape and np.abs(frames - plain).mean() < 3
    # The file says it, and it is made again so.
    again = ["generate", "--from", str(folder / "a.mp4"), "--model", str(folder / model), "--quiet"]
    again += ["--image", str(folder / "a.png"), "--device", "cpu", "--overwrite", "--output", str(folder / "b.mp4")]
    assert main(again) == 0, capsys.readouterr().err
    np.testing.assert_array_equal(read_video(folder / "b.mp4")[0], frames)


def test_a_light_decoder(folder, capsys, monkeypatch):
    name = str(folder / "taew2_1.safetensors")
    torch.manual_seed(0)
    save_file(LightDecoder("taew2_1").half().state_dict(), name)
    assert generate(folder, "wan", "--light-decoder", name) == 0, capsys.readouterr().err
    frames, record = made(folder)
    assert record["light_decoder"] == "taew2_1" and frames.shape[1:] == (384, 384, 3)
    # A batch makes the same, and its run names the file without its folder.
    row = {"prompt": "a red circle", "image": str(folder / "a.png"), "seed": 1, "name": "one"}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    size = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "1", "--dtype", "float32"]
    batch = ["batch", str(folder / "rows.jsonl"), str(folder / "run"), "--model", str(folder / "wan"), *size]
    assert main([*batch, "--light-decoder", name, "--device", "cpu", "--quiet"]) == 0, capsys.readouterr().err
    np.testing.assert_array_equal(read_video(folder / "run" / "videos" / "one.mp4")[0], frames)
    run = json.loads((folder / "run" / "run.json").read_text())
    assert run["light_decoder"] == "taew2_1.safetensors"
    # The app serves a pipeline with it.
    served = []
    monkeypatch.setattr("diffusers_fvg.app.server.serve", lambda pipe, *options, **named: served.append(pipe))
    monkeypatch.setattr("diffusers_fvg.app.server.check_installed", lambda page: None)
    monkeypatch.setattr("diffusers_fvg.cli.app._check_place", lambda *_: None)
    assert main(["app", "--model", str(folder / "wan"), "--light-decoder", name, "--device", "cpu", "--quiet"]) == 0
    assert served[0].light_decoder.config.name == "taew2_1"
    # A preview is made again with the VAE.
    again = ["generate", "--from", str(folder / "a.mp4"), "--model", str(folder / "wan"), "--quiet"]
    again += ["--image", str(folder / "a.png"), "--device", "cpu", "--overwrite", "--output", str(folder / "b.mp4")]
    assert main(again) == 0, capsys.readouterr().err
    assert read_video_metadata(folder / "b.mp4")["light_decoder"] is None
    assert np.abs(read_video(folder / "b.mp4")[0] - frames).mean() > 3
    # The files are for two different VAEs, and in a folder or repository they have their published names.
    other = name.replace("taew2_1", "taew2_2")
    save_file(LightDecoder("taew2_2").half().state_dict(), other)
    (folder / "empty").mkdir()
    for place, message in (
        (other, f"--light-decoder {other} does not fit the model, which needs taew2_1: taew2_1 is for"),
        (str(folder / "empty"), f"There is no file 'taew2_1.safetensors' in '{folder / 'empty'}'"),
    ):
        assert generate(folder, "wan", "--light-decoder", place) == 2
        assert message in capsys.readouterr().err
    # An image-to-video pipeline decodes itself, and the embedded model has a VAE of its own.
    assert generate(folder, "i2v", "--light-decoder", name) == 2
    assert main(["generate", "a red circle", "--light-decoder", "org/light", "--output", str(folder / "c.mp4")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("does not fit the model: taew2_1 is for Wan 2.1") == 2, errors


def test_four_bits_are_refused_without_an_accelerator(folder, capsys, monkeypatch):
    monkeypatch.setattr("diffusers_fvg.cli.pipeline.importlib.util.find_spec", lambda name: True)
    assert generate(folder, "wan", "--quantize", "nf4") == 2
    assert "--quantize nf4 needs an accelerator" in capsys.readouterr().err


def test_products_in_eight_bits_are_refused_without_a_gpu_that_has_them(folder, capsys, monkeypatch):
    monkeypatch.setattr("diffusers_fvg.cli.pipeline.importlib.util.find_spec", lambda name: True)
    assert generate(folder, "wan", "--quantize", "fp8-dynamic") == 2
    assert "--quantize fp8-dynamic cannot run: cpu is not an NVIDIA GPU" in capsys.readouterr().err


def test_products_in_eight_bits(folder, capsys, monkeypatch):
    """torchao multiplies float8 on a CPU too, but asks for a GPU."""
    pytest.importorskip("torchao")
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    monkeypatch.setattr("diffusers_fvg.animate.quantization.fp8_problem", lambda device, dtype: None)
    narrow = ["--dtype", "bfloat16"]
    assert generate(folder, "wan", *narrow) == 0, capsys.readouterr().err
    plain, _ = made(folder)
    assert generate(folder, "wan", *narrow, "--quantize", "fp8-dynamic") == 0, capsys.readouterr().err
    frames, record = made(folder)
    assert record["quantization"] == {"transformer": "torchao-fp8-dynamic"}
    assert 0 < np.abs(frames - plain).mean() < 3
    again = ["generate", "--from", str(folder / "a.mp4"), "--model", str(folder / "wan"), "--quiet", "--overwrite"]
    again += ["--image", str(folder / "a.png"), "--device", "cpu", "--output", str(folder / "b.mp4")]
    assert main(again) == 0, capsys.readouterr().err
    np.testing.assert_array_equal(read_video(folder / "b.mp4")[0], frames)
    assert generate(folder, "i2v", *narrow, "--quantize", "fp8-dynamic") == 2
    assert "layers of an image-to-video pipeline" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["wan", "i2v"])
def test_compiled_blocks(model, folder, capsys):
    """By inductor, which takes its minute on a CPU."""
    assert generate(folder, model) == 0
    plain, _ = made(folder)
    assert generate(folder, model, "--compile") == 0, capsys.readouterr().err
    np.testing.assert_allclose(made(folder)[0], plain, atol=2)
