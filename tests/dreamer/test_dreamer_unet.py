import math

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig
from tiny_dreamer import PLAIN, SWITCHES, tiny_unet, tiny_unet2d

from diffusers_fvg.dreamer.layers import ClipAttention, pixel_positions
from diffusers_fvg.dreamer.unet import FactorizedDreamerUNet


VARIANTS = {
    "all": {},
    "concat, up": {"t2i_adapter": "concat", "paca": "up"},
    "fps": {"fps_conditioning": True},
    "plain": PLAIN,
}
each_variant = pytest.mark.parametrize("switches", VARIANTS.values(), ids=VARIANTS)
B, F, H, W = 2, 3, 8, 9


def conditions(unet, batch_size=B, seed=1):
    """Inputs of all designs of the UNet."""
    config, generator = unet.config, torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(batch_size, *shape, generator=generator)

    inputs = {}
    if config.paca is not None:
        inputs["image_latents"] = draw(4, H, W)
    if config.t2i_adapter is not None:
        inputs["image_embeds"] = draw(config.image_embed_dim)
    if config.motion_embed_dim is not None:
        inputs["motion_embeds"] = draw(5, config.motion_embed_dim)
    if config.fps_conditioning:
        inputs["fps"] = torch.tensor([8.0, 24.0])[:batch_size]
    return inputs


def noisy(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(B, 4, F, H, W, generator=generator)
    return {
        "sample": sample,
        "timestep": torch.tensor([17, 803]),
        "encoder_hidden_states": torch.randn(B, 7, 32, generator=generator),
    }


def per_frame(unet2d, inputs):
    """Runs the image UNet on every frame."""
    sample = unet2d(
        inputs["sample"].transpose(1, 2).flatten(0, 1),
        inputs["timestep"].repeat_interleave(F),
        inputs["encoder_hidden_states"].repeat_interleave(F, 0),
    ).sample
    return sample.unflatten(0, (B, F)).transpose(1, 2)


# -- start


@each_variant
def test_it_starts_as_the_image_unet_frame_by_frame(switches):
    unet = tiny_unet(**switches)
    with torch.no_grad():
        made = unet(**noisy(), **conditions(unet)).sample
        expected = per_frame(tiny_unet2d(), noisy())
    assert (made - expected).abs().max() == 0.0
    # The new layers are there: once they move, so does the prediction.
    moved = tiny_unet(trained=True, **switches)
    assert (moved(**noisy(), **conditions(moved)).sample - expected).abs().max() > 1e-2


LAST_MAPS = ("conv4.3.weight", "conv4.3.bias", "attention.proj_out.weight", "attention.proj_out.bias")
LAST_MAPS += ("pixel_attention.to_out.weight", "motion_attention.to_out.weight", "to_v_ip.0.weight", "processor.gate")
LAST_MAPS += ("fps_embedding.linear_2.weight", "fps_embedding.linear_2.bias")


@each_variant
def test_gradients_reach_every_new_tensor(switches):
    unet = tiny_unet(**switches).train()
    new = dict(unet.video_parameters())
    # What begins at zero learns from the first step on, and what lies behind it from the second on: all of it takes part.
    last_maps = [name for name in new if name.endswith(LAST_MAPS)]
    assert all(not new[name].any() for name in last_maps)
    unet(**noisy(), **conditions(unet)).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in new.values())
    assert [name for name in last_maps if not new[name].grad.any()] == []
    for parameter in new.values():
        parameter.data -= parameter.grad
        parameter.grad = None
    unet(**noisy(), **conditions(unet)).sample.square().mean().backward()
    assert [name for name, parameter in new.items() if not parameter.grad.any()] == []


def test_video_parameters_are_what_the_image_unet_does_not_have():
    unet = tiny_unet(fps_conditioning=True)
    stock = dict(tiny_unet2d().named_parameters())
    new = dict(unet.video_parameters())
    assert not new.keys() & stock.keys()
    assert new.keys() | stock.keys() == dict(unet.named_parameters()).keys()


# -- what each design sees


def difference(unet, inputs, changed):
    with torch.no_grad():
        return (unet(**inputs).sample - unet(**inputs | changed).sample).abs().amax((1, 3, 4))


def test_frames_see_each_other_and_videos_do_not():
    unet = tiny_unet(trained=True)
    inputs = noisy() | conditions(unet)
    sample = inputs["sample"].clone()
    sample[0, :, 2] += 1
    moved = difference(unet, inputs, {"sample": sample})
    assert (moved[0] > 1e-4).all() and (moved[1] == 0).all()


@pytest.mark.parametrize("name", ["image_latents", "image_embeds", "motion_embeds", "fps"])
@pytest.mark.parametrize("t2i_adapter", ["decoupled", "concat"])
def test_a_condition_reaches_all_frames_of_its_own_video(name, t2i_adapter):
    unet = tiny_unet(trained=True, fps_conditioning=True, t2i_adapter=t2i_adapter)
    inputs = noisy() | conditions(unet)
    changed = inputs[name].clone()
    changed[0] = 3 * changed[0] + changed[0].flip(-1) if changed.ndim > 1 else 2 * changed[0]
    moved = difference(unet, inputs, {name: changed})
    assert (moved[0] > 1e-4).all() and (moved[1] == 0).all()


def test_the_order_of_frames_matters():
    unet = tiny_unet(trained=True, **PLAIN)
    inputs = noisy()
    turned = inputs | {"sample": inputs["sample"].flip(2)}
    with torch.no_grad():
        assert (unet(**turned).sample.flip(2) - unet(**inputs).sample).abs().max() > 1e-3


def test_a_time_for_every_frame():
    unet = tiny_unet(**PLAIN)
    inputs = noisy()
    times = torch.tensor([[0, 17, 17], [803, 803, 5]])
    with torch.no_grad():
        made = unet(**inputs | {"timestep": times}).sample
        for video in range(B):
            for frame in range(F):
                expected = tiny_unet2d()(
                    inputs["sample"][[video], :, frame],
                    times[video, frame],
                    inputs["encoder_hidden_states"][[video]],
                ).sample
                assert (made[video, :, frame] - expected[0]).abs().max() < 1e-5


def test_dropped_images_leave_no_trace():
    unet = tiny_unet(trained=True)
    inputs = noisy() | conditions(unet)
    without = {name: value for name, value in inputs.items() if not name.startswith("image")}
    with torch.no_grad():
        kept = unet(**inputs).sample
        dropped = unet(**inputs, image_mask=torch.tensor([0.0, 1.0])).sample
        absent = unet(**without).sample
    assert torch.equal(dropped[1], kept[1]) and (dropped[0] - kept[0]).abs().max() > 1e-3
    assert (dropped[0] - absent[0]).abs().max() < 1e-6


def test_padding_of_the_motion_text_has_value_zero():
    """Attention by hand, in float64: tokens of zeros take their share of a softmax and give nothing."""
    torch.manual_seed(0)
    attention = ClipAttention(8, 6, 2).double()
    torch.nn.init.normal_(attention.to_out.weight)
    frames, tokens = torch.randn(2 * F, 8, 2, 3).double(), torch.randn(2, 4, 6).double()
    tokens[1, 2:] = 0
    made = attention(frames, attention.keys_values(tokens))
    normed = tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for video in range(2):
        for frame in range(F):
            pixels = frames[video * F + frame].flatten(1).T
            centred = pixels - pixels.mean(-1, keepdim=True)
            query = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()) @ attention.to_q.weight.T
            key, value = normed[video] @ attention.to_k.weight.T, normed[video] @ attention.to_v.weight.T
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                weights = (query[:, head] @ key[:, head].T / 2).exp()
                heads.append(weights / weights.sum(-1, keepdim=True) @ value[:, head])
            expected = pixels + torch.cat(heads, -1) @ attention.to_out.weight.T
            assert (made[video * F + frame].flatten(1).T - expected).abs().max() < 1e-10


def test_pixels_know_their_place():
    positions = pixel_positions(3, 5, 16, torch.zeros(1)).unflatten(0, (3, 5))
    rows, columns = positions[..., :8], positions[..., 8:]
    assert torch.equal(rows[:, 0], rows[:, 4]) and torch.equal(columns[0], columns[2])
    # The fastest pair turns once in four pixels.
    expected = torch.tensor([0.0, 2, 0, -2, 0])
    assert (columns[0, :, 0] - expected).abs().max() < 1e-5
    assert (rows[:, 0, 0] - expected[:3]).abs().max() < 1e-5
    # The slowest one in 256.
    assert abs(columns[0, 4, 3] - 2 * math.sin(4 * 2 * math.pi / 256)) < 1e-6
    # Over a picture of one colour keys differ only by where they are, and so do queries of frames of one colour.
    torch.manual_seed(0)
    attention = ClipAttention(16, 16, 2)
    torch.nn.init.normal_(attention.to_out.weight)
    key, value, queries = attention.pixel_keys_values(torch.ones(1, 16, 3, 5))
    assert (value - value[:, :, :1]).abs().max() < 1e-6
    assert (key[:, :, 0] - key[:, :, 1]).abs().max() > 1e-2
    image, frame = torch.randn(1, 16, 3, 5), torch.linspace(-1, 1, 16).view(1, 16, 1, 1).expand(1, 16, 3, 5)
    seen = attention(frame, attention.pixel_keys_values(image)) - frame
    assert (seen[..., 0, 0] - seen[..., 2, 4]).abs().max() > 1e-2


def test_a_pixel_begins_at_its_own_place():
    """Most attention is on the pixel's own place and its neighbours, whatever frames and image hold."""
    torch.manual_seed(0)
    attention = tiny_unet2d_wide().pixel_attention
    frame, image = torch.randn(1, 64, 8, 8), torch.randn(1, 64, 8, 8)
    key, _, positions = attention.pixel_keys_values(image)
    query = attention._heads(attention.to_q(attention.norm(frame.flatten(2).transpose(1, 2))) + positions)
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)[0]
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    near = (places[:, None] - places).abs().amax(-1) <= 1
    assert (weights * near).sum(-1).mean() > 0.5 > 4 * near.float().mean()


def tiny_unet2d_wide():
    unet = FactorizedDreamerUNet.from_unet2d(tiny_unet2d(block_out_channels=(64, 64)), **SWITCHES)
    return unet.down_blocks[0].attentions[0]


# -- once per video


def test_caches_are_filled_once_and_change_nothing():
    unet = tiny_unet(trained=True)
    inputs, calls = noisy() | conditions(unet), []
    for module in (unet.image_pyramid, unet.image_projection, *(m for m in unet.modules() if is_key_projection(m))):
        module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = unet(**inputs).sample
        once = len(calls)
        image_cache, motion_cache, unguided_cache = {}, {}, {}
        for _ in range(3):
            made = unet(**inputs, image_cache=image_cache, motion_cache=motion_cache).sample
            assert torch.equal(made, expected)
        assert len(calls) == 2 * once
        other = inputs | {"motion_embeds": -inputs["motion_embeds"]}
        unguided = unet(**other, image_cache=image_cache, motion_cache=unguided_cache).sample
        # Four layers attend to the motion's text: 1 down, 1 mid, 2 up. Nothing of the image was computed again.
        assert len(calls) == 2 * once + 4
        assert (unguided - unet(**other).sample).abs().max() == 0
        assert (unguided - expected).abs().max() > 1e-4


def is_key_projection(module):
    return isinstance(module, torch.nn.RMSNorm)


# -- loading


@each_variant
def test_it_saves_and_loads(switches, tmp_path):
    unet = tiny_unet(trained=True, **switches)
    unet.save_pretrained(tmp_path)
    loaded = FactorizedDreamerUNet.from_pretrained(tmp_path)
    for name, value in (SWITCHES | switches).items():
        assert loaded.config[name] == value
    assert loaded.state_dict().keys() == unet.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(**noisy(), **conditions(unet)).sample, unet(**noisy(), **conditions(unet)).sample)


def test_dtype_is_that_of_the_image_unet():
    unet = FactorizedDreamerUNet.from_unet2d(tiny_unet2d().to(torch.bfloat16), **SWITCHES)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    made = unet(**{name: value.bfloat16() if value.is_floating_point() else value for name, value in noisy().items()},
                **conditions(unet)).sample  # fmt: skip
    assert made.dtype == torch.bfloat16 and made.isfinite().all()


def test_a_lora_of_the_image_unet_loads(tmp_path):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    unet2d = tiny_unet2d()
    torch.manual_seed(3)
    unet2d.add_adapter(config)
    unet2d.save_lora_adapter(tmp_path)
    unet = tiny_unet()
    unet.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        made, expected = unet(**noisy(), **conditions(unet)).sample, per_frame(unet2d, noisy())
        assert (made - expected).abs().max() < 1e-5
        assert (expected - per_frame(tiny_unet2d(), noisy())).abs().max() > 1e-2


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet(trained=True).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**noisy(), **conditions(unet)).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    assert all((gradients[0][name] - gradients[1][name]).abs().max() < 1e-6 for name in gradients[0])


def test_features_are_what_the_output_layers_see():
    unet = tiny_unet(trained=True)
    output = unet(**noisy(), **conditions(unet), return_features=True)
    assert output.features.shape == (B, 16, F, H, W)
    frames = output.features.transpose(1, 2).flatten(0, 1)
    prediction = unet.conv_out(unet.conv_act(unet.conv_norm_out(frames))).unflatten(0, (B, F)).transpose(1, 2)
    assert (prediction - output.sample).abs().max() < 1e-6
    assert unet(**noisy(), **conditions(unet)).features is None


# -- refusals


@pytest.mark.parametrize(
    ("switches", "inputs", "match"),
    [
        (PLAIN, {"image_latents": torch.zeros(B, 4, H, W)}, "`image_latents` was given.*no `paca`"),
        (PLAIN, {"image_embeds": torch.zeros(B, 12)}, "`image_embeds` was given.*no `t2i_adapter`"),
        (PLAIN, {"motion_embeds": torch.zeros(B, 1, 24)}, "`motion_embeds` was given.*no `motion_embed_dim`"),
        (PLAIN, {"fps": torch.ones(B)}, "`fps` was given.*no `fps_conditioning`"),
        ({**PLAIN, "fps_conditioning": True}, {}, "pass `fps`"),
        ({**PLAIN, "num_frames": 2}, {}, "has 3 frames, but the UNet takes at most 2"),
    ],
)
def test_inputs_that_would_be_ignored_are_refused(switches, inputs, match):
    with pytest.raises(ValueError, match=match):
        tiny_unet(**switches)(**noisy(), **inputs)


def test_other_families_are_refused():
    for config, match in (
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"in_channels": 9}, "`in_channels=9` and `out_channels=4`"),
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "AttnDownBlock2D"),
    ):
        with pytest.raises(ValueError, match=match):
            FactorizedDreamerUNet.from_unet2d(tiny_unet2d(**config), **SWITCHES)
    for switches, match in (({"paca": "down"}, "paca='down'"), ({"num_frames": 1}, "num_frames=1")):
        with pytest.raises(ValueError, match=match):
            tiny_unet(**switches)
    with pytest.raises(ValueError, match="must be a UNet2DConditionModel"):
        FactorizedDreamerUNet.from_unet2d(tiny_unet())
    with_lora = tiny_unet2d()
    with_lora.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="adapters.*default"):
        FactorizedDreamerUNet.from_unet2d(with_lora)
    with_ip_adapter = tiny_unet2d()
    attention = with_ip_adapter.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(IPAdapterAttnProcessor2_0(32, 32))
    with pytest.raises(ValueError, match="do not fit its config.*to_k_ip"):
        FactorizedDreamerUNet.from_unet2d(with_ip_adapter, **SWITCHES | PLAIN)
