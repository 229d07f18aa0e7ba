from dataclasses import replace

import pytest
import torch
from tiny import tiny_pipeline
from training_runs import OPTIONS, moving_square

from diffusers_fvg import Anchor, AnchorLora, SchedulerPreset, SchedulerPresets
from diffusers_fvg.animate.anchor import crop_and_resize
from diffusers_fvg.animate.conditioning import latent_index
from diffusers_fvg.schedules.flow import add_noise
from diffusers_fvg.training.config import TrainConfig
from diffusers_fvg.training.draws import (
    Pictures,
    anchor_index,
    appended_frames,
    draw,
    draw_loss,
    drawn_times,
    generator_for,
)
from diffusers_fvg.training.families import Wan
from diffusers_fvg.training.objectives import anchored_flow_loss, sample_sigmas


def config(**options) -> TrainConfig:
    return TrainConfig(model="m", data="d", cache_dir="c", output_dir="o", **OPTIONS | options)


def generators(count: int) -> list[torch.Generator]:
    return [generator_for("test", index) for index in range(count)]


class Recorder:
    """Replaces the transformer: records its inputs and predicts zero."""

    def __call__(self, hidden_states, timestep, encoder_hidden_states, return_dict, anchor_positions=None):
        self.hidden_states, self.timestep, self.anchor_positions = hidden_states, timestep, anchor_positions
        appended = 0 if anchor_positions is None else anchor_positions.shape[1]
        return (torch.zeros_like(hidden_states[:, :, : hidden_states.shape[2] - appended]),)


@pytest.mark.parametrize(("batch_size", "std"), [(1, 1.0), (7, 1.0), (24, 1.2), (64, 1.2), (100, 0.7)])
def test_sampled_sigmas_are_those_of_their_formula_bit_for_bit(batch_size, std):
    for seed in range(20):
        normal = torch.randn(batch_size, generator=generator_for("sigmas", seed))
        even = torch.sigmoid(std * normal)
        sigmas = sample_sigmas(batch_size, 3.0, generator_for("sigmas", seed), std)
        assert torch.equal(sigmas, 3.0 * even / (1 + 2.0 * even))
    torch.manual_seed(0)
    sigmas = sample_sigmas(batch_size, std=std)
    torch.manual_seed(0)
    assert torch.equal(sigmas, torch.sigmoid(std * torch.randn(batch_size)))


def test_drawn_times_closed_forms():
    quantiles = torch.tensor([0.1, 0.5, 0.8413447])
    uniform = config(timestep_density="uniform", flow_shift=1.0)
    assert torch.allclose(drawn_times(quantiles, uniform), quantiles)
    # A cut to [0.5, 1] of a uniform density is uniform there.
    assert torch.allclose(drawn_times(quantiles, uniform, (0.5, 1.0)), 0.5 + quantiles / 2)
    # The quantile of one standard deviation, 0.8413, is sigmoid(std); the median shifted by 5 is 5/6.
    logit_normal = drawn_times(quantiles, config(flow_shift=1.0, timestep_std=1.3))
    assert logit_normal[1:].tolist() == pytest.approx([0.5, 1 / (1 + 2.718281828**-1.3)], abs=1e-6)
    assert drawn_times(quantiles, config(flow_shift=5.0))[1].item() == pytest.approx(5 / 6, abs=1e-6)


@pytest.mark.parametrize("density", ["uniform", "logit-normal"])
def test_drawn_times_of_an_expert_are_those_of_the_whole_that_lie_in_its_range(density):
    train, boundary = config(timestep_density=density, flow_shift=3.0), 0.875
    quantiles = (torch.arange(20_000) + 0.5) / 20_000
    whole = drawn_times(quantiles, train)
    for low, high in ((boundary, 1.0), (0.0, boundary)):
        own = whole[(whole > low) & (whole < high)]
        part = drawn_times((torch.arange(len(own)) + 0.5) / len(own), train, (low, high))
        assert part.min() > low and part.max() < high
        assert (part - own).abs().max() < 1e-3
    ends = drawn_times(torch.tensor([0.0, 1.0]), train)
    assert ends.isfinite().all() and ends[0] > 0 and ends[1] <= 1


def test_anchor_index_follows_its_law():
    # 81 frames: the middle one, 40, is in latent 10.
    for law, expected in {"first": {0}, "start-middle-last": {0, 10, 20}, "uniform": set(range(21))}.items():
        generator = torch.Generator().manual_seed(0)
        assert {anchor_index(law, 21, generator) for _ in range(400)} == expected


@pytest.mark.parametrize("frame_times", ["shared", "independent"])
@pytest.mark.parametrize("anchor_noise", [0.0, 0.3])
def test_draw_gives_each_frame_its_noise_level_and_time(frame_times, anchor_noise):
    train = config(frame_times=frame_times, anchor_noise=anchor_noise, anchor_probability=0.5)
    clean = torch.randn(64, 2, 5, 2, 2, generator=torch.Generator().manual_seed(1))
    drawn, model = draw(clean, generators(64), train), Recorder()
    draw_loss(model, clean, drawn, torch.zeros(64, 1, 1))

    # The noise level of the timestep must be that of the latents.
    level = (model.timestep / 1000)[:, None, :, None, None]
    assert torch.allclose(model.hidden_states, (1 - level) * clean + level * drawn.noise, atol=1e-5)
    anchored = drawn.counted == 0
    assert 16 < anchored.any(1).sum() < 48 and anchored.sum(1).max() == 1
    given, free = model.timestep[anchored], model.timestep[~anchored]
    assert free.min() > 0
    if anchor_noise == 0:
        assert given.max() == 0 and torch.equal(
            model.hidden_states.transpose(1, 2)[anchored], clean.transpose(1, 2)[anchored]
        )
    else:
        clip = (drawn.sigmas * 1000)[:, None].expand(64, 5)[anchored]
        assert given.min() > 0 and (given <= 0.3 * clip).all() and (given / clip).max() > 0.15
    times = model.timestep.masked_fill(anchored, torch.nan)
    spread = torch.stack([row[~row.isnan()].max() - row[~row.isnan()].min() for row in times])
    assert (spread == 0).all() if frame_times == "shared" else (spread > 0).all()


def test_draw_of_a_clip_does_not_depend_on_its_batch():
    clean = torch.randn(3, 2, 5, 2, 2)
    together, alone = draw(clean, generators(3), config()), draw(clean[:1], generators(1), config())
    assert torch.equal(together.noise[:1], alone.noise) and torch.equal(together.sigmas[:1], alone.sigmas)


def test_draw_drops_the_share_of_prompts():
    clean = torch.zeros(400, 1, 2, 1, 1)
    share = draw(clean, generators(400), config(prompt_dropout=0.2)).drop_prompt.float().mean()
    # Three standard deviations of the binomial, 0.02 each.
    assert abs(share - 0.2) < 0.06


@pytest.mark.parametrize("masked", [True, False])
def test_draw_loss_is_masked_and_renormalised(masked):
    """With a zero prediction and clean latents of zero, the error of frame k is the square of its noise, here (k + 1)^2."""
    clean = torch.zeros(2, 3, 4, 2, 2)
    drawn = draw(clean, generators(2), config(mask_anchor_loss=masked))
    frames = torch.arange(1.0, 5.0).view(1, 1, 4, 1, 1).expand_as(clean)
    drawn = replace(drawn, noise=frames)
    errors = [1.0, 4.0, 9.0, 16.0]
    given = (drawn.anchors.strength == 1).nonzero()[:, 1].tolist()
    assert len(given) == 2
    kept = [error for index in given for k, error in enumerate(errors) if k != index or not masked]
    loss = draw_loss(Recorder(), clean, drawn, torch.zeros(2, 1, 1))
    assert loss.item() == pytest.approx(sum(kept) / len(kept), rel=1e-6)


def test_draw_loss_agrees_with_the_objective_where_that_is_defined():
    clean = torch.randn(4, 2, 5, 2, 2)
    drawn = draw(clean, generators(4), config())

    def model(hidden_states, timestep, encoder_hidden_states, return_dict):
        return (hidden_states * timestep[:, None, :, None, None] / 500,)

    expected = anchored_flow_loss(model, clean, drawn.noise, drawn.sigmas, torch.zeros(4, 1, 1), drawn.anchors)
    assert torch.equal(draw_loss(model, clean, drawn, torch.zeros(4, 1, 1)), expected)


@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_model_inputs_are_bit_equal_to_those_of_the_pipeline(sigma):
    frames = moving_square(0)
    preset = SchedulerPreset("one", "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, (sigma,), 1.0, 1.0)
    pipe = tiny_pipeline(schedulers=SchedulerPresets.of(preset))
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.stack([crop_and_resize(frame, 32, 32) for frame in frames], dim=1)
    clean = Wan.encode(pipe.vae, pixels[None])

    drawn, model = draw(clean, generators(1), config(anchor_position="first")), Recorder()
    drawn = replace(drawn, sigmas=torch.tensor([sigma]))
    draw_loss(model, clean, drawn, torch.zeros(1, 1, 1))

    seen = {}
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    start = add_noise(clean, drawn.noise, torch.tensor(sigma))
    options = {"num_frames": 9, "height": 32, "width": 32, "preset": "one", "max_sequence_length": 16}
    pipe.animate("a red circle", anchors=Anchor(frames[0]), latents=start, output_type="latent", **options)
    assert torch.equal(seen["timestep"], model.timestep) and seen["timestep"].shape == (1, 3)
    assert torch.equal(seen["hidden_states"], model.hidden_states)

    # The same for anchors behind the clip.
    key, size = "transformer.blocks.0.attn1.to_q.lora_{}.weight", pipe.transformer.blocks[0].attn1.to_q.in_features
    zeros = {key.format("A"): torch.zeros(1, size), key.format("B"): torch.zeros(size, 1)}
    pipe.anchor_lora = AnchorLora(zeros, {"anchor_form": "appended"})
    for frame, position in ((4, 1.375), (8, 2.375)):
        alone = Wan.encode(pipe.vae, pixels[None, :, [frame]])
        pictures = Pictures(alone, torch.tensor([[frame]]))
        train = config(anchor_position="start-middle-last", anchor_form="appended")
        # A seed that draws the frame.
        drawn = next(
            found
            for index in range(99)
            for found in [draw(clean, [generator_for("test", index)], train, pictures=pictures)]
            if found.anchors.appended is not None
        )
        draw_loss(model, clean, replace(drawn, sigmas=torch.tensor([sigma])), torch.zeros(1, 1, 1))
        start = add_noise(clean, drawn.noise, torch.tensor(sigma))
        anchor = Anchor(frames[frame], frame)
        pipe.animate("a red circle", anchors=anchor, latents=start, output_type="latent", **options)
        for name in ("hidden_states", "timestep", "anchor_positions"):
            assert torch.equal(seen[name], getattr(model, name)), name
        assert seen["anchor_positions"].tolist() == [[position]] and seen["timestep"].shape == (1, 4)
        assert seen["timestep"][0, :3].min() == seen["timestep"].max() > 0 == seen["timestep"][0, 3]


def test_frames_that_may_be_appended():
    def frames(clip="clip", num_frames=17, **options):
        return appended_frames(config(anchor_form="appended", **options), clip, num_frames)

    assert frames(anchor_position="start-middle-last") == [8, 16] and frames(anchor_position="first") == []
    assert frames(anchor_position="start-middle-last", num_frames=1) == frames(num_frames=1) == []
    assert appended_frames(config(anchor_position="uniform"), "clip", 17) == []
    # One of each latent frame behind the first, and over many clips all of them.
    drawn = [frames(str(number), anchor_position="uniform") for number in range(99)]
    assert all([latent_index(frame) for frame in row] == [1, 2, 3, 4] for row in drawn)
    assert {frame for row in drawn for frame in row} == set(range(1, 17))
    assert frames("7", anchor_position="uniform") == drawn[7]


@pytest.mark.parametrize("frame_times", ["shared", "independent"])
def test_a_drawn_picture_is_appended_in_place_of_its_latent_frame(frame_times):
    train = config(
        anchor_position="start-middle-last", anchor_form="appended", frame_times=frame_times, anchor_noise=0.3
    )
    clean = torch.randn(64, 2, 5, 2, 2, generator=torch.Generator().manual_seed(1))
    pictures = Pictures(torch.randn(64, 2, 2, 2, 2), torch.tensor([[8, 16]]).expand(64, -1))
    drawn, slots, model = (
        draw(clean, generators(64), train, pictures=pictures),
        draw(clean, generators(64), train),
        Recorder(),
    )
    draw_loss(model, clean, drawn, torch.zeros(64, 1, 1))
    appended, given = drawn.anchors.appended, slots.counted == 0
    # A later latent frame that was anchored is free now; an anchored first frame stays anchored.
    assert torch.equal(drawn.counted == 0, given & (torch.arange(5) == 0)) and 16 < given[:, 1:].sum() < 60
    assert torch.equal(drawn.noise, slots.noise) and (drawn.anchors.strength >= 0).all()
    for clip, index in given.nonzero().tolist():
        position = {0: -1.0, 2: 2.375, 4: 4.375}[index]
        assert appended.positions[clip].item() == position
        strength = appended.strength[clip].item()
        assert strength == (0 if index == 0 else pytest.approx(slots.anchors.strength[clip, index].item()))
        level = (1 - strength) * drawn.sigmas[clip]
        assert model.timestep[clip, 5].item() == pytest.approx(1000 * level.item(), abs=1e-2)
        latents = pictures.latents[clip, :, index // 2 - 1] if index else torch.zeros(2, 2, 2)
        expected = (1 - level) * latents + level * appended.noise[clip, :, 0]
        torch.testing.assert_close(model.hidden_states[clip, :, 5], expected, rtol=0, atol=1e-6)
    assert set(given.nonzero()[:, 1].tolist()) == {0, 2, 4}
    # A batch in which no image is drawn is the same as without images.
    assert (
        draw(clean, generators(64), replace(train, anchor_position="first"), pictures=pictures).anchors.appended
        is None
    )
