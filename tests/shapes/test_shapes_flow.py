import numpy as np
import pytest
import torch

from diffusers_fvg.shapes.flow import exact_flow
from diffusers_fvg.shapes.world import BACKGROUND, Change, ShapeObject, render


def centre(frame):
    """Of what is not background: x, y in pixels."""
    weight = np.abs(frame.astype(float) - BACKGROUND).sum(-1)
    rows, columns = np.mgrid[: frame.shape[0], : frame.shape[1]] + 0.5
    return np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()


@pytest.mark.parametrize(
    "change",
    [Change("move", (0.3, -0.1)), Change("move", (0.2, 0.2), 0.25, 0.75), Change("bounce", (0.3, 2))],
    ids=["line", "part of the time", "bounce"],
)
@pytest.mark.parametrize("shape", ["circle", "square"])
def test_flow_is_how_the_drawn_object_moves(change, shape):
    item = ShapeObject("red", shape, 0.4, 0.6, 0.12, (change,))
    frames = render((item,), 9, 64, 96)
    flow = exact_flow((item,), 9, 64, 96)
    assert flow.shape == (2, 8, 64, 96)
    for frame in range(8):
        inside = np.abs(frames[frame].astype(float) - BACKGROUND).sum(-1) > 150
        moved = flow[:, frame].numpy()[:, inside]
        assert np.abs(moved - moved[:, :1]).max() < 1e-6
        assert np.abs(moved[:, 0] - (centre(frames[frame + 1]) - centre(frames[frame]))).max() < 0.05
        assert not flow[:, frame].numpy()[:, np.abs(frames[frame].astype(int) - BACKGROUND).sum(-1) == 0].any()
    assert flow.abs().max() > 1


def test_flow_of_growth_keeps_the_centre_and_carries_the_rim():
    item = ShapeObject("blue", "circle", 0.5, 0.5, 0.1, (Change("scale", 2.0),))
    flow = exact_flow((item,), 2, 64, 64)[:, 0].numpy()
    # Twice as large: a pixel moves by its own distance from the centre.
    assert np.abs(flow[:, 32, 36] - [4.5, 0.5]).max() < 1e-5
    assert np.abs(flow[:, 28, 31] - [-0.5, -3.5]).max() < 1e-5


def test_the_object_in_front_hides_the_flow_behind_it():
    back = ShapeObject("green", "square", 0.5, 0.5, 0.3, (Change("move", (0.2, 0.0)),))
    front = ShapeObject("red", "square", 0.5, 0.5, 0.1)
    flow = exact_flow((back, front), 3, 32, 32)[:, 0]
    assert flow[:, 16, 16].tolist() == [0, 0] and abs(flow[0, 16, 10] - 3.2) < 1e-5


def test_colour_does_not_hide_motion():
    # Red to cyan passes the grey of the background on the way.
    changes = (Change("move", (0.2, 0.0)), Change("recolour", "cyan"))
    recoloured, plain = (ShapeObject("red", "circle", 0.4, 0.5, 0.2, c) for c in (changes, changes[:1]))
    assert torch.equal(exact_flow((recoloured,), 5, 32, 32), exact_flow((plain,), 5, 32, 32))
