"""Pictures as people have them: upright, opaque, in their range, or refused; and fitted to a clip without stretching."""

import logging

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from diffusers_fvg import Anchor
from diffusers_fvg.animate import anchor as pictures
from diffusers_fvg.animate.anchor import anchor_pixels, crop_and_resize, fit_picture, picture_image, picture_tensor


RED, GREY = (255, 0, 0), (51, 102, 204)


@pytest.fixture(autouse=True)
def warnings(monkeypatch, caplog):
    """What was logged; each test is told of its own crops."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(pictures.logger, "propagate", True)
    pictures._tell_of_crop.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name == pictures.logger.name]


def cornered(mode: str = "RGB") -> PIL.Image.Image:
    """16 rows of 24 pixels, 8 x 8 of them red at the top left. JPEG's blocks are as large."""
    image = PIL.Image.new("RGB", (24, 16), GREY)
    image.paste(RED, (0, 0, 8, 8))
    return image.convert(mode)


# Where the top left of the stored picture is to be seen (EXIF 2.3, tag 0x0112), and whether height and width change places.
ORIENTATIONS = {
    1: ("top", "left", False),
    2: ("top", "right", False),
    3: ("bottom", "right", False),
    4: ("bottom", "left", False),
    5: ("top", "left", True),
    6: ("top", "right", True),
    7: ("bottom", "right", True),
    8: ("bottom", "left", True),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_upright(tmp_path, orientation, suffix):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    cornered().save(tmp_path / f"photo.{suffix}", exif=exif, **options)
    with PIL.Image.open(tmp_path / f"photo.{suffix}") as image:
        seen = picture_tensor(image)
    row, column, turned = ORIENTATIONS[orientation]
    assert seen.shape == (3, 24, 16) if turned else (3, 16, 24)
    rows = slice(0, 8) if row == "top" else slice(-8, None)
    columns = slice(0, 8) if column == "left" else slice(-8, None)
    torch.testing.assert_close(seen[:, rows, columns].mean((1, 2)), torch.tensor([1.0, 0, 0]), atol=0.1, rtol=0)
    # A sixth of it is red, in that corner and nowhere else.
    assert round(float((seen[0] > 0.6).float().mean()), 2) == 0.17


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "RGBa", "PA"])
def test_every_mode_is_shown_in_its_colours(mode, warnings):
    """White and black are so in every mode."""
    image = PIL.Image.new("RGB", (4, 2), "black")
    image.paste("white", (0, 0, 2, 2))
    image = image.convert({"PA": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    seen = picture_tensor(image)
    assert seen.shape == (3, 2, 4) and seen.dtype == torch.float32
    torch.testing.assert_close(seen[:, :, :2], torch.ones(3, 2, 2), atol=0.01, rtol=0)
    torch.testing.assert_close(seen[:, :, 2:], torch.zeros(3, 2, 2), atol=0.01, rtol=0)
    assert warnings() == []


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "HSV", "RGBA"])
def test_colours_are_kept(mode):
    seen = picture_tensor(cornered(mode))
    expected = torch.tensor(GREY).view(3, 1, 1).expand(3, 16, 24).clone() / 255
    expected[:, :8, :8] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    # `convert("P")` chooses among 216 colours in steps of 51, of which these are.
    torch.testing.assert_close(seen, expected, atol=0.02, rtol=0)


def transparent(kind: str) -> PIL.Image.Image:
    """The left half is red and opaque, the right one black and clear."""
    image = PIL.Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 4))
    if kind == "RGBA":
        return image
    if kind == "RGB":
        image = image.convert("RGB")
        image.info["transparency"] = (0, 0, 0)
        return image
    palette = PIL.Image.new("P", (8, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 0, 4, 4))
    palette.info["transparency"] = 1
    return palette


@pytest.mark.parametrize("kind", ["RGBA", "RGB", "P"])
@pytest.mark.parametrize("saved", [False, True])
def test_transparency_is_laid_on_white_and_told(kind, saved, tmp_path, warnings):
    image = transparent(kind)
    if saved:
        image.save(tmp_path / "picture.png")
        image = PIL.Image.open(tmp_path / "picture.png")
    seen = picture_tensor(image)
    assert torch.equal(seen[:, :, :4], torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 4, 4))
    assert torch.equal(seen[:, :, 4:], torch.ones(3, 4, 4))
    assert warnings() == ["The anchor image is transparent (50.0% of it) and is blended with white."]


def test_half_transparent_pixels_are_half_white():
    seen = picture_tensor(PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 127)))
    torch.testing.assert_close(seen, torch.full((3, 4, 4), 128 / 255), atol=0.003, rtol=0)


def test_sixteen_bits_keep_their_levels(tmp_path):
    grey = (np.arange(24, dtype=np.uint16).reshape(4, 6) * 2849).clip(0, 65535)
    expected = torch.tensor(grey / 65535).float().expand(3, 4, 6)
    PIL.Image.fromarray(grey).save(tmp_path / "grey.png")
    PIL.Image.fromarray(grey).save(tmp_path / "grey.tif")
    big_endian = PIL.Image.frombytes("I;16B", (6, 4), grey.astype(">u2").tobytes())
    for image in (*(PIL.Image.open(tmp_path / name) for name in ("grey.png", "grey.tif")), big_endian):
        assert image.mode.startswith("I;16")
        torch.testing.assert_close(picture_tensor(image), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(picture_tensor(np.repeat(grey[..., None], 3, axis=2)), expected, atol=1e-6, rtol=0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(grey).save(tmp_path / "turned.tif", exif=exif)
    turned = picture_tensor(PIL.Image.open(tmp_path / "turned.tif"))
    torch.testing.assert_close(turned, expected.rot90(-1, (1, 2)), atol=1e-6, rtol=0)


def test_floats_and_bytes_in_any_container():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    for image in (
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        torch.from_numpy(pixels).permute(2, 0, 1),
        expected.double(),
        expected.requires_grad_(),
    ):
        torch.testing.assert_close(picture_tensor(image), expected, atol=1e-6, rtol=0)
    grey = PIL.Image.fromarray((pixels[..., 0] / 255).astype(np.float32))
    assert grey.mode == "F"
    torch.testing.assert_close(picture_tensor(grey), expected[:1].expand(3, 4, 6), atol=1e-6, rtol=0)
    assert np.array_equal(np.asarray(picture_image(pixels)), pixels)


def animation(folder, suffix: str) -> PIL.Image.Image:
    frames = [PIL.Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(folder / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    return PIL.Image.open(folder / f"moving.{suffix}")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animated_files_are_refused_and_their_frames_are_not(tmp_path, suffix):
    image = animation(tmp_path, suffix)
    with pytest.raises(ValueError, match=r"animated or has several pages, 3 in all.*`image\.copy\(\)`"):
        picture_tensor(image)
    image.seek(2)
    blue = torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, 16, 16)
    torch.testing.assert_close(picture_tensor(image.copy()), blue, atol=0.02, rtol=0)


def test_a_file_of_one_frame_and_a_photo_with_its_preview_are_pictures(tmp_path):
    cornered().save(tmp_path / "still.gif")
    preview = PIL.Image.new("RGB", (24, 16), "lime")
    cornered().save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[preview], quality=95)
    for name in ("still.gif", "photo.jpg"):
        image = PIL.Image.open(tmp_path / name)
        assert name == "still.gif" or image.n_frames == 2
        seen = picture_tensor(image)[:, :8, :8].mean((1, 2))
        torch.testing.assert_close(seen, torch.tensor([1.0, 0, 0]), atol=0.1, rtol=0)


BYTES = np.full((4, 6, 3), 200, np.uint8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (BYTES.astype(np.float32), r"lie in \[0, 1\], but range from 200 to 200"),
        (BYTES / 255 - 1, "range from -0.216"),
        (BYTES > 100, "but are bool"),
        (BYTES.astype(np.int64), "but are int64"),
        (BYTES.astype(np.uint16), "only up to 200, which would be black"),
        (PIL.Image.fromarray(BYTES[..., 0].astype(np.uint16)), "only up to 200, which would be black"),
        (PIL.Image.fromarray(BYTES[..., 0]).convert("I"), "mode I, whose value range"),
        (PIL.Image.new("LAB", (4, 6)), "mode LAB, whose value range"),
        (PIL.Image.fromarray(BYTES[..., 0]).convert("F"), r"lie in \[0, 1\], but range from 200 to 200"),
        (np.full((4, 6, 3), np.nan), "must be finite"),
        (BYTES[..., 0], r"\(H, W, 3\).*\(4, 6\)"),
        (np.concatenate([BYTES, BYTES[..., :1]], axis=2), r"\(H, W, 3\).*\(4, 6, 4\)"),
        (BYTES[:0], "has no pixels"),
        (torch.from_numpy(BYTES), r"\(3, H, W\).*\(4, 6, 3\)"),
        (torch.from_numpy(BYTES).permute(2, 0, 1).int(), "but are torch.int32"),
        (torch.from_numpy(BYTES).permute(2, 0, 1) > 100, "but are torch.bool"),
        (torch.from_numpy(BYTES).permute(2, 0, 1).float(), r"lie in \[0, 1\], but range from 200 to 200"),
        ("picture.png", "but is str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_black_white_or_sideways_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        picture_tensor(image)


def test_a_crop_of_more_than_a_tenth_is_told_once(warnings):
    fit_picture(np.zeros((60, 100, 3), np.uint8), 32, 48)
    assert warnings() == []
    for _ in range(2):
        anchor_pixels(Anchor([PIL.Image.new("RGB", (100, 50))] * 5), 32, 48)
    # Of 100 columns of the 50 rows 75 have the shape 3 to 2.
    assert warnings() == [
        "A picture of 50 x 100 (height x width) is cropped to the aspect ratio of 32 x 48: 25% of it is lost at left and right."
    ]
    fit_picture(PIL.Image.new("RGB", (30, 60)), 32, 32)
    assert warnings()[1:] == [
        "A picture of 60 x 30 (height x width) is cropped to the aspect ratio of 32 x 32: 50% of it is lost at top and bottom."
    ]


# -- the fit --------------------------------------------------------------------------------------------------------------


def test_crop_and_resize_keeps_an_exact_fit_bit_for_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 * 2 - 1
    for image in (pixels, PIL.Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1).float() / 255):
        torch.testing.assert_close(crop_and_resize(image, 32, 48), expected, atol=1e-6, rtol=0)


def test_an_exact_fit_keeps_every_byte():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 48), dtype=np.uint8)
    fitted = fit_picture(PIL.Image.fromarray(pixels.transpose(1, 2, 0)), 32, 48)
    assert np.array_equal((fitted * 255).round().byte().numpy(), pixels)


# Scaled to cover the size, the first has an odd number of columns too many, the second of rows, the third a width of 53.33.
CROPS = [
    ((36, 59), (36, 32)),
    ((62, 32), (45, 32)),
    ((36, 60), (32, 32)),
    ((64, 64), (224, 224)),
    ((27, 48), (60, 104)),
]


@pytest.mark.parametrize(("source", "size"), CROPS)
def test_a_symmetric_picture_stays_symmetric(source, size):
    half = torch.rand(3, *source, generator=torch.Generator().manual_seed(0))
    picture = (half + half.flip(1) + half.flip(2) + half.flip(1, 2)) / 4
    fitted = fit_picture(picture, *size)
    for axis in (1, 2):
        torch.testing.assert_close(fitted, fitted.flip(axis), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("source", "size"), CROPS)
def test_the_crop_is_centred_and_scaled_alike_in_both_directions(source, size):
    # Each pixel of the picture holds its own place, and each fitted one what it stands for.
    places = torch.tensor(np.mgrid[0 : source[0], 0 : source[1]] + 0.5) / 64
    fitted = 64 * fit_picture(torch.cat([places, places[:1]]), *size)
    scale = min(source[0] / size[0], source[1] / size[1])
    for axis, (before, after) in enumerate(zip(source, size)):
        expected = before / 2 + scale * (torch.arange(after) + 0.5 - after / 2)
        # A filter that reaches over the picture's edge is cut there.
        inner = (expected > 2 * max(scale, 1)) & (expected < before - 2 * max(scale, 1))
        error = fitted[axis].transpose(axis, 1) - expected
        assert error[:, inner].abs().max() < 0.02


@pytest.mark.parametrize(("source", "size"), CROPS)
def test_all_kinds_of_pictures_are_fitted_alike(source, size):
    places = np.mgrid[0 : source[0], 0 : source[1]].sum(0) / 12
    pixels = (127.5 + 100 * np.stack([np.sin(places), np.cos(places), np.sin(2 * places)], axis=2)).astype(np.uint8)
    floats = pixels / np.float32(255)
    fitted = fit_picture(PIL.Image.fromarray(pixels), *size)
    for other in (pixels, floats, torch.tensor(floats).permute(2, 0, 1)):
        assert torch.equal(fit_picture(other, *size), fitted)
    # PIL rounds bytes after each direction.
    whole = np.asarray(PIL.ImageOps.fit(PIL.Image.fromarray(pixels), size[::-1]), dtype=int)
    assert np.abs(whole - (255 * fitted).round().permute(1, 2, 0).numpy()).max() <= 1


def test_crop_and_resize_never_stretches():
    # A disc in a wide picture stays a disc: equal extents up and across.
    rows, columns = np.mgrid[0:120, 0:300]
    disc = (np.hypot(rows - 60, columns - 150) < 40).astype(np.float32)
    out = crop_and_resize(np.repeat(disc[..., None], 3, axis=2), 64, 64)[0] > 0
    assert abs(int(out.any(0).sum()) - int(out.any(1).sum())) <= 1
    assert abs(int(out.any(0).sum()) - round(80 * 64 / 120)) <= 1


def test_crop_and_resize_refuses(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"")
    noisy = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noisy.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    with pytest.raises(ValueError, match="cannot be decoded"):
        crop_and_resize(PIL.Image.open(tmp_path / "cut.png"), 32, 32)
    with pytest.raises(ValueError, match=r"\(H, W, 3\).*\(32, 32\)"):
        crop_and_resize(np.zeros((32, 32)), 32, 32)
    with pytest.raises(ValueError, match="-1 to 1"):
        crop_and_resize(torch.linspace(-1, 1, 3 * 4).view(3, 2, 2), 32, 32)
    with pytest.raises(ValueError, match="str"):
        crop_and_resize("picture.png", 32, 32)
