import sys

import numpy as np
import pytest
import torch
from tiny_dreamer import tiny_unet

from diffusers_fvg.dreamer.flow import dis_flow, latent_flow
from diffusers_fvg.dreamer.predict_net import PredictNet, end_point_error, flow_loss
from diffusers_fvg.shapes.flow import exact_flow
from diffusers_fvg.shapes.world import Change, ShapeObject, render


def test_latent_flow_counts_latent_pixels():
    flow = torch.zeros(2, 1, 16, 32)
    flow[0, :, :8, :8], flow[1, :, :, 16:] = 8.0, 4.0
    made = latent_flow(flow, 2, 4)
    # A quarter of the first latent pixel's neighbours, none: area, in units of 8 pixels.
    assert made[0, 0].tolist() == [[1.0, 0, 0, 0], [0, 0, 0, 0]]
    assert made[1, 0].tolist() == [[0, 0, 0.5, 0.5]] * 2
    assert latent_flow(flow, 2, 2)[0, 0].tolist() == [[0.25, 0], [0, 0]]


def test_flow_of_real_clips_is_the_motion_of_texture():
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.float32)
    texture = torch.from_numpy(noise).permute(2, 0, 1)[None]
    texture = torch.nn.functional.interpolate(texture, size=(96, 96), mode="bicubic")[0].clamp(0, 255)
    frames = np.stack([np.roll(texture.permute(1, 2, 0).byte().numpy(), (i, 2 * i), (0, 1)) for i in range(3)])
    flow = dis_flow(frames)
    assert flow.shape == (2, 2, 96, 96) and flow.dtype == torch.float32
    inner = flow[:, :, 16:-16, 16:-16].median(-1).values.median(-1).values
    assert (inner - torch.tensor([[2.0, 2.0], [1.0, 1.0]])).abs().max() < 0.2


def test_without_opencv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        dis_flow(np.zeros((2, 8, 8, 3), dtype=np.uint8))


def test_loss_and_error():
    predicted, target = torch.zeros(1, 2, 1, 1, 2), torch.zeros(1, 2, 1, 1, 2)
    target[0, :, 0, 0, 0] = torch.tensor([3.0, -0.4])
    # Of four numbers one is 3 away (3 - 1/2), one 0.4 (0.4^2 / 2).
    assert abs(flow_loss(predicted, target).item() - (2.5 + 0.08) / 4) < 1e-6
    assert abs(end_point_error(predicted, target).item() - (9 + 0.16) ** 0.5 / 2) < 1e-6


def test_predict_net_reads_neighbours_and_teaches_the_unet(tmp_path):
    torch.manual_seed(0)
    net = PredictNet(in_channels=16, hidden_channels=8)
    unet = tiny_unet(t2i_adapter=None, paca=None, motion_embed_dim=None)
    sample, text = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 5, 32)
    features = unet(sample, torch.tensor(500), text, return_features=True).features
    flow = net(features)
    assert flow.shape == (1, 2, 3, 8, 8)
    loss = flow_loss(flow, torch.ones_like(flow))
    loss.backward()
    # Its gradient goes into the video layers from the first step on: that is what it is for.
    assert unet.down_blocks[0].resnets[0].temporal_conv.conv4[-1].weight.grad.any()
    assert all(parameter.grad.any() for parameter in net.parameters())
    with torch.no_grad():
        # Two frames make one flow, whatever else there is, up to the reach of two convolutions over time.
        far = torch.cat([features, torch.randn_like(features)], dim=2)
        assert (net(far)[:, :, :1] - flow[:, :, :1]).abs().max() < 1e-6
        assert (net(far)[:, :, 2] - flow[:, :, 2]).abs().max() > 1e-3
        net.save_pretrained(tmp_path)
        assert torch.equal(PredictNet.from_pretrained(tmp_path)(features), flow)


def test_predict_net_learns_the_flow_of_a_moving_square():
    torch.manual_seed(0)
    moves = [(dx, dy) for dx in (-0.15, 0.0, 0.15) for dy in (-0.15, 0.0, 0.15)]
    clips = [
        (ShapeObject("red", "square", 0.5 - dx / 2, 0.5 - dy / 2, 0.25, (Change("move", (dx, dy)),)),)
        for dx, dy in moves
    ]
    # Features that are the frames themselves.
    frames = np.stack([render(clip, 3, 16, 16) for clip in clips])
    features = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 128 - 1
    target = torch.stack([exact_flow(clip, 3, 16, 16) for clip in clips])
    net = PredictNet(in_channels=3, hidden_channels=16)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        loss = flow_loss(net(features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error, still = (end_point_error(flow, target) for flow in (net(features), torch.zeros_like(target)))
    assert error < 0.6 * still
