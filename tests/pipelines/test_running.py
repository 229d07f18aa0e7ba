"""One call at a time on one pipeline, nothing left behind by a call that fails, nothing that is not finite goes on."""

import contextlib
import copy
import itertools
import random
import threading
import time

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from tiny import tiny_pipeline, tiny_transformer
from tiny_cogvideox import tiny_cogvideox_pipeline
from tiny_dreamer import tiny_dreamer_pipeline

from diffusers_fvg import Anchor, AnchorComposer, AnchorLora, FactorizedVideoPipeline, load_lora
from diffusers_fvg.locks import exclusive, lockable
from diffusers_fvg.lora.scales import AdapterScales
from diffusers_fvg.schedules.presets import WAN_PRESETS, SchedulerPresets, unipc_preset


SIZE = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "output_type": "pt"}
CALL = {**SIZE, "num_inference_steps": 2}
PROMPT = "a red circle moves to the right"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lora():
    donor = tiny_transformer()
    torch.manual_seed(9)
    donor.add_adapter(LoraConfig(r=4, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False))
    return AnchorLora({f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor).items()})


def lora_pipeline(**changes):
    """A pipeline with an anchor LoRA, and a preset with a window of attention."""
    window = unipc_preset("window", 2, 5.0, 5.0, "this test", anchor_window=0)
    return quiet(
        tiny_pipeline(anchor_lora=lora(), schedulers=SchedulerPresets.of(*WAN_PRESETS.values(), window), **changes)
    )


@pytest.fixture(scope="module")
def pipe():
    return lora_pipeline()


# What each kind of call changes while it runs.
CALLS = {
    "factorized": lambda pipe: pipe(PROMPT, generator=seeded(1), **CALL).frames,
    "direct": lambda pipe: pipe(PROMPT, mode="direct", generator=seeded(2), **CALL).frames,
    "storyboard": lambda pipe: pipe(PROMPT, mode="storyboard", generator=seeded(3), **CALL).frames,
    "image": lambda pipe: pipe(PROMPT, image=picture(), generator=seeded(4), **CALL).frames,
    "scale": lambda pipe: (
        pipe(PROMPT, image=picture(), generator=seeded(4), attention_kwargs={"scale": 0.3}, **CALL).frames
    ),
    "scale 0": lambda pipe: (
        pipe(PROMPT, image=picture(), generator=seeded(4), attention_kwargs={"scale": 0}, **CALL).frames
    ),
    "window": lambda pipe: pipe(PROMPT, image=picture(), generator=seeded(4), preset="window", **SIZE).frames,
    "text of another length": lambda pipe: (
        pipe(PROMPT, mode="direct", generator=seeded(5), **CALL | {"max_sequence_length": 8}).frames
    ),
    "animate": lambda pipe: pipe.animate(
        PROMPT, Anchor(picture(1), -1), generator=seeded(6), guidance_scale=1.0, **CALL
    ),
    "compose": lambda pipe: torch.from_numpy(
        np.stack([np.asarray(image) for image in pipe.compose(["a star"], 32, 32, generator=[seeded(7)])])
    ),
}


@pytest.fixture(scope="module")
def expected(pipe):
    """What each call gives, one after the other. All differ, so that a mixture shows."""
    frames = {name: call(pipe) for name, call in CALLS.items()}
    values = [value for value in frames.values() if value.shape == frames["image"].shape]
    assert len({value.numpy().tobytes() for value in values}) == len(values)
    return frames


def state(pipe):
    """All that a call may change in what the pipeline holds."""
    layers = [module for module in pipe.transformer.modules() if isinstance(module, BaseTunerLayer)]
    return {
        "strengths": [dict(layer.scaling) for layer in layers],
        "active": [list(layer.active_adapters) for layer in layers],
        "window": pipe.transformer.anchor_window,
        "scheduler": {name: repr(value) for name, value in vars(pipe.scheduler).items()},
        "tiling": pipe.vae.use_tiling,
        "running": "_progress" in vars(pipe),
        "composer's scheduler": "step" in vars(pipe.composer.pipeline.scheduler),
        "random": torch.random.get_rng_state().tolist(),
    }


def equal(pipe, expected, names=CALLS):
    for name in names:
        assert torch.equal(CALLS[name](pipe), expected[name]), name


def test_the_device_is_found_once_in_a_run(monkeypatch):
    """diffusers goes through all modules of all components to find it."""
    pipe, found, stock = lora_pipeline(), [], DiffusionPipeline._execution_device.fget

    def find(self):
        found.append(self)
        return stock(self)

    monkeypatch.setattr(DiffusionPipeline, "_execution_device", property(find))
    pipe(PROMPT, **CALL)
    assert not any(each is pipe for each in found)
    apply_layerwise_casting(pipe.transformer, torch.float32, torch.float32)
    pipe(PROMPT, **CALL)
    assert sum(each is pipe for each in found) == 1
    pipe(PROMPT, **CALL)
    assert sum(each is pipe for each in found) == 2


# -- threads


def test_a_call_while_one_runs_is_refused_and_the_other_is_right(pipe, expected):
    before, right, refused, wrong = state(pipe), [], [], []
    start = threading.Barrier(8)

    def call(seed):
        chosen = random.Random(seed)
        start.wait()
        made = 0
        while made < 2:
            name = chosen.choice(list(CALLS))
            try:
                frames = CALLS[name](pipe)
            except RuntimeError as error:
                assert "FactorizedVideoPipeline is already running" in str(error)
                refused.append(name)
                time.sleep(chosen.random() / 20)
            else:
                made += 1
                (right if torch.equal(frames, expected[name]) else wrong).append(name)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(right) == 16 and len(refused) >= 8
    assert state(pipe) == before
    equal(pipe, expected, ["image", "direct"])


def test_pipelines_of_the_same_components_run_in_threads_as_one_after_the_other(pipe, expected):
    other = quiet(FactorizedVideoPipeline(**pipe.components))
    assert other.transformer is pipe.transformer
    made = {id(pipe): [], id(other): []}

    def call(pipe, names):
        for name in names:
            made[id(pipe)].append((name, CALLS[name](pipe)))

    names = list(CALLS)
    threads = [threading.Thread(target=call, args=pair) for pair in ((pipe, names), (other, names[::-1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(map(len, made.values())) == 2 * len(CALLS)
    for name, frames in sum(made.values(), []):
        assert torch.equal(frames, expected[name]), name


@pytest.mark.parametrize("outer", ["direct", "scale", "window", "text of another length"])
def test_nothing_of_a_run_shows_in_another_pipeline_of_the_same_components(pipe, expected, outer):
    # In the middle of each stage of one pipeline's call, a whole call of another.
    other = quiet(FactorizedVideoPipeline(**pipe.components))
    inner = []

    class Interleaved(FactorizedVideoPipeline):
        def __call__(self, *args, **kwargs):
            def call_other(_, stage, step, steps):
                inner.append(CALLS["image"](other))

            return super().__call__(*args, callback_on_stage_step=call_other, **kwargs)

    made = CALLS[outer](quiet(Interleaved(**pipe.components)))
    assert torch.equal(made, expected[outer])
    assert len(inner) >= 4 and all(torch.equal(frames, expected["image"]) for frames in inner)


def test_a_user_s_own_scheduler_is_shared_and_not_changed():
    pipe = lora_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    before = {name: repr(value) for name, value in vars(pipe.scheduler).items()}
    alone = pipe(PROMPT, image=picture(), generator=seeded(), **CALL).frames
    other = quiet(FactorizedVideoPipeline(**pipe.components))

    def between(_, step, timestep, tensors):
        other(PROMPT, mode="direct", generator=seeded(), **CALL | {"num_inference_steps": 3})
        return tensors

    made = pipe(PROMPT, image=picture(), generator=seeded(), callback_on_step_end=between, **CALL).frames
    assert torch.equal(made, alone)
    assert {name: repr(value) for name, value in vars(pipe.scheduler).items()} == before


def test_a_callback_cannot_call_its_own_pipeline(pipe, expected):
    for call in (CALLS["image"], CALLS["compose"], lambda pipe: pipe.rewrite(PROMPT)):
        with pytest.raises(RuntimeError, match="already running.*another pipeline from the same components"):
            pipe(PROMPT, image=picture(), callback_on_step_end=lambda *_, call=call: call(pipe), **CALL)
        with pytest.raises(RuntimeError, match="already running"):
            pipe(PROMPT, image=picture(), callback_on_stage_step=lambda *_, call=call: call(pipe), **CALL)
    equal(pipe, expected, ["image"])


def test_exclusive_is_entered_again_by_its_thread_and_by_no_other():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    order = []

    def wait():
        with exclusive(b, a):
            order.append("thread")

    with exclusive(a, b, None):
        thread = threading.Thread(target=wait)
        thread.start()
        with exclusive(b):
            time.sleep(0.05)
            order.append("here")
    thread.join()
    assert order == ["here", "thread"]


# -- what fails


class Planted(Exception):
    pass


def models(pipe):
    """What runs in a call, by name."""
    inner = pipe.composer.pipeline
    parts = {"rewriter": pipe.rewriter.model, "text_encoder": pipe.text_encoder, "transformer": pipe.transformer}
    parts |= {"encoder": pipe.vae.encoder, "decoder": pipe.vae.decoder, "block": pipe.transformer.blocks[-1]}
    return parts | {"composer": inner.transformer, "composer's decoder": inner.vae.decoder}


@contextlib.contextmanager
def failing(module, at, error):
    """The module's forward number `at` raises; yields a list of all forwards."""
    forwards = []

    def hook(*_):
        forwards.append(module)
        if len(forwards) == at:
            raise error

    handle = module.register_forward_pre_hook(hook)
    try:
        yield forwards
    finally:
        handle.remove()


def test_the_call_after_a_failed_one_is_right_wherever_it_failed(pipe, expected):
    whole = {"attention_kwargs": {"scale": 0.5}, **CALL}
    before, errors, places = (
        state(pipe),
        [Planted("planted"), KeyboardInterrupt(), torch.OutOfMemoryError("planted")],
        0,
    )
    calls = ({"mode": "factorized"}, {"mode": "direct"})
    with contextlib.ExitStack() as stack:
        forwards = {name: stack.enter_context(failing(module, 0, None)) for name, module in models(pipe).items()}
        pipe(PROMPT, generator=seeded(), **whole)
    for name, module in models(pipe).items():
        assert forwards[name], name
        # The first, one in the middle and the last forward of every model.
        for at in sorted({1, (len(forwards[name]) + 1) // 2, len(forwards[name])}):
            error = errors[places % len(errors)]
            places += 1
            with failing(module, at, error), pytest.raises(type(error)):
                pipe(PROMPT, generator=seeded(), **whole)
            assert state(pipe) == before, (name, at)
        equal(pipe, expected, ["image" if places % 2 else "direct"])
    assert places >= 14
    reports = []
    for arguments in calls:
        arguments |= {"generator": seeded()} | whole
        pipe(PROMPT, callback_on_stage_step=lambda _, *report: reports.append(report), **arguments)
        for number in range(len(reports)):
            error, seen = errors[number % len(errors)], []

            def fail(_, *report, seen=seen, number=number, error=error):
                seen.append(report)
                if len(seen) == number + 1:
                    raise error

            with pytest.raises(type(error)):
                pipe(PROMPT, callback_on_stage_step=fail, **arguments)
            assert state(pipe) == before, reports[number]
        reports.clear()
    equal(pipe, expected)


def test_a_bad_scale_is_refused_and_the_next_call_is_right(pipe, expected):
    for scale in (float("nan"), float("inf"), "0.5"):
        with pytest.raises(ValueError, match=r"attention_kwargs\['scale'\].*finite number"):
            pipe(PROMPT, image=picture(), attention_kwargs={"scale": scale}, **CALL)
    equal(pipe, expected, ["image"])


def test_strengths_of_deltas_are_put_back_in_the_weights():
    transformer = tiny_transformer(anchored=True)
    bias = transformer.proj_out.bias.detach().clone()
    load_lora(transformer, {"transformer.proj_out.diff_b": torch.ones_like(bias)}, "delta", strength=0.25)
    transformer.parameter_deltas.refresh()
    assert torch.allclose(transformer.proj_out.bias, bias + 0.25)
    with pytest.raises(Planted), AdapterScales(transformer, 2.0).applied():
        transformer.parameter_deltas.refresh()
        assert torch.allclose(transformer.proj_out.bias, bias + 0.5)
        raise Planted
    assert torch.allclose(transformer.proj_out.bias, bias + 0.25)


def test_an_error_between_two_deltas_does_not_count_as_written(monkeypatch):
    transformer = tiny_transformer(anchored=True)
    bias = transformer.proj_out.bias.detach().clone()
    load_lora(transformer, {"transformer.proj_out.diff_b": torch.ones_like(bias)}, "delta")
    deltas = transformer.parameter_deltas
    deltas.refresh()
    deltas.set_scale("delta", 3.0)
    value = type(deltas)._value
    monkeypatch.setattr(type(deltas), "_value", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))
    with pytest.raises(torch.OutOfMemoryError):
        deltas.refresh()
    monkeypatch.setattr(type(deltas), "_value", value)
    deltas.set_scale("delta", 1.0)
    deltas.refresh()
    assert torch.allclose(transformer.proj_out.bias, bias + 1)


# -- NaN and infinity

BAD_NUMBERS = [float("nan"), float("inf"), -float("inf")]
PIPELINES = {"wan": tiny_pipeline, "cogvideox": tiny_cogvideox_pipeline, "dreamer": tiny_dreamer_pipeline}
SIZES = {
    "wan": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 1},
    "cogvideox": {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "num_inference_steps": 1},
    "dreamer": {"height": 32, "width": 32, "num_frames": 4, "max_sequence_length": 8, "num_inference_steps": 1},
}
NUMBERS = {
    "wan": ["guidance_scale", "guidance_scale_2"],
    "cogvideox": ["guidance_scale"],
    "dreamer": ["guidance_scale", "guidance_rescale", "fps"],
}
COUNTS = [
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "num_videos_per_prompt",
    "max_sequence_length",
    "rewriter_max_new_tokens",
    "composer_num_inference_steps",
]


def shape_of(name, pipe):
    return pipe._latents_shape(1, *(SIZES[name][size] for size in ("num_frames", "height", "width")))


@pytest.fixture(scope="module", params=PIPELINES)
def family(request):
    return request.param, quiet(PIPELINES[request.param]())


def untouched(pipe, monkeypatch):
    """Any forward of a model fails."""

    def forward(*_, **__):
        raise AssertionError("a model ran before the input was checked")

    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            monkeypatch.setattr(type(component), "forward", forward)


def test_a_number_that_is_not_finite_is_refused_before_a_model_runs(family, monkeypatch):
    name, pipe = family
    untouched(pipe, monkeypatch)
    names = [*NUMBERS[name], *COUNTS, "composer_guidance_scale", *(["num_moments"] if name != "dreamer" else [])]
    for argument in names:
        for value in [*BAD_NUMBERS, "2"]:
            with pytest.raises(ValueError, match=f"`{argument}=.*(finite|whole) number"):
                pipe(PROMPT, **SIZES[name] | {argument: value})
    for value in (*BAD_NUMBERS, 1.5, True):
        with pytest.raises(ValueError, match="`num_videos_per_prompt=.*whole number"):
            pipe(PROMPT, **SIZES[name], num_videos_per_prompt=value)
        with pytest.raises(ValueError, match="`num_inference_steps=.*whole number"):
            pipe.animate(PROMPT, **SIZES[name] | {"num_inference_steps": value})
    for value in BAD_NUMBERS:
        with pytest.raises(ValueError, match="strength"):
            pipe.animate(PROMPT, Anchor(picture(), strength=value), **SIZES[name])


def test_a_tensor_that_is_not_finite_is_refused_before_a_model_runs(family, monkeypatch):
    name, pipe = family
    untouched(pipe, monkeypatch)
    latents = torch.zeros(shape_of(name, pipe))
    embeds = torch.zeros(1, SIZES[name]["max_sequence_length"], 32)
    pair = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds}
    if name == "dreamer":
        motion = torch.zeros(1, SIZES[name]["max_sequence_length"], pipe.unet.config.motion_embed_dim)
        pair |= {"prompt_embeds_2": motion, "negative_prompt_embeds_2": motion}
    for argument, value in {"latents": latents, **pair}.items():
        for bad in BAD_NUMBERS:
            planted = value.clone()
            planted.view(-1)[-1] = bad
            given = {"latents": planted, "prompts": PROMPT} if argument == "latents" else pair | {argument: planted}
            with pytest.raises(ValueError, match=rf"`{argument}` \(torch.float32\) holds values that are not finite"):
                pipe.animate(**given, **SIZES[name])
    bad = np.full((32, 32, 3), np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="finite"):
        pipe.animate(PROMPT, Anchor(bad), **SIZES[name])


@contextlib.contextmanager
def planted_nan(module):
    """NaN in the last parameter of a model: all that it makes is NaN."""
    parameter = list(module.parameters())[-1]
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(float("nan"))
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


def stages(name, pipe):
    """Part that goes wrong -> stage that stops, and where."""
    video = {"wan": "transformer", "cogvideox": "transformer", "dreamer": "unet"}[name]
    parts = {
        "rewrite": (pipe.rewriter.model.lm_head, "token 1"),
        "compose": (pipe.composer.pipeline.transformer, "step 1 of"),
        "encode": (pipe.text_encoder, ""),
        "denoise": (getattr(pipe, video), "step 1 of 1"),
        "decode": (pipe.vae.decoder, ""),
    }
    return parts


def test_a_stage_that_makes_nan_stops_with_its_name_step_and_dtype(family):
    name, pipe = family
    for stage, (module, place) in stages(name, pipe).items():
        with planted_nan(module), pytest.raises(FloatingPointError) as caught:
            pipe(PROMPT, **SIZES[name], output_type="pil")
        assert f"Stage `{stage}` made values that are not finite" in str(caught.value)
        assert place in str(caught.value) and "torch.float32" in str(caught.value)
    with planted_nan(pipe.vae.encoder), pytest.raises(FloatingPointError, match="Stage `encode`"):
        pipe(PROMPT, image=picture(), **SIZES[name])
    assert len(pipe(PROMPT, **SIZES[name]).frames) == 1


def test_a_composer_whose_decoder_makes_nan_draws_no_black_picture(pipe):
    with planted_nan(pipe.composer.pipeline.vae.decoder), pytest.raises(FloatingPointError, match="Stage `compose`"):
        pipe.compose(["a star"], 32, 32)


def test_a_callback_s_nan_stops_at_its_step(family):
    name, pipe = family
    nan = {"latents": torch.full(shape_of(name, pipe), float("nan"))}
    call = SIZES[name] | {"num_inference_steps": 3}
    with pytest.raises(FloatingPointError, match="Stage `denoise` .* step 2 of 3, computing in torch.float32"):
        pipe(PROMPT, mode="direct", callback_on_step_end=lambda _, step, *__: dict(nan) if step == 1 else {}, **call)


def test_a_scheduler_and_a_preset_with_nan_are_refused():
    with pytest.raises(ValueError, match="`flow_shift=nan`"):
        unipc_preset("bad", 3, float("nan"), 5.0, "this test")
    with pytest.raises(ValueError, match="`guidance_scale=nan`"):
        unipc_preset("bad", 3, 5.0, float("nan"), "this test")
    with pytest.raises(ValueError, match="`guidance_interval.*finite"):
        unipc_preset("bad", 3, 5.0, 5.0, "this test", guidance_interval=(0.0, float("nan")))
    pipe = lora_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=float("nan")))
    with pytest.raises(ValueError, match="`scheduler.sigmas` .* not finite"):
        pipe(PROMPT, mode="direct", **CALL)
    with pytest.raises(ValueError, match="`boundary_ratio=nan`"):
        tiny_pipeline(boundary_ratio=float("nan"))


def test_a_lora_with_nan_is_refused():
    state_dict = copy.deepcopy(lora().state_dict)
    key = next(iter(state_dict))
    state_dict[key][0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"{key}.*not finite"):
        tiny_pipeline(anchor_lora=AnchorLora(state_dict))
    pipe = lora_pipeline()
    with pytest.raises(ValueError, match=f"{key}.*not finite"):
        pipe.load_lora_weights(state_dict, "other")
    with pytest.raises(ValueError, match="`strength=nan`"):
        pipe.load_lora_weights(lora().state_dict, "other", strength=float("nan"))
    assert pipe.get_active_adapters() == ["anchor"]
    pipe.set_adapters("anchor", float("nan"))
    with pytest.raises(FloatingPointError, match="Stage `denoise` .* step 1 of 2"):
        pipe(PROMPT, image=picture(), **CALL)


def test_a_run_takes_all_that_its_stages_take():
    # A thread that holds some parts and takes others may wait for one that does so the other way round.
    pipe = tiny_pipeline()
    assert pipe._parts_of_a_run() == []
    apply_layerwise_casting(pipe.vae, torch.float16, torch.float32)
    parts = pipe._parts_of_a_run()
    for taken in (
        *lockable(pipe.composer.pipeline.components.values()),
        *(pipe.rewriter.model, pipe.rewriter.tokenizer),
        *(pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.transformer),
    ):
        assert any(part is taken for part in parts)


def test_two_threads_decode_by_one_vae_in_turn(pipe):
    other = quiet(FactorizedVideoPipeline(**pipe.components))
    latents = torch.randn(1, 16, 2, 4, 4, generator=seeded())
    expected, inside, errors = pipe.decode(latents, "pt"), [], []

    def watch(module, inputs):
        inside.append(threading.get_ident())
        time.sleep(0.01)

    def decode(pipe):
        if not torch.equal(pipe.decode(latents, "pt"), expected):
            errors.append(pipe)

    handle = pipe.vae.decoder.register_forward_pre_hook(watch)
    threads = [threading.Thread(target=decode, args=(one,)) for one in (pipe, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    # The frames of one thread's video come together.
    assert errors == [] and [len(list(group)) for _, group in itertools.groupby(inside)] == [2, 2]


def test_infinity_of_a_composer_s_decoder_is_no_white_picture(pipe):
    bias = pipe.composer.pipeline.vae.decoder.conv_out.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("inf"))
    try:
        with pytest.raises(FloatingPointError, match="Stage `compose`"):
            pipe.compose(["a star"], 32, 32)
    finally:
        with torch.no_grad():
            bias.copy_(kept)


def test_an_interrupt_while_strengths_are_put_back_is_mended_by_the_next_call(pipe, expected):
    scales = AdapterScales(pipe.transformer, 0.5)

    class Interrupted(dict):
        def update(self, *args, **kwargs):
            if args[0] == dict(strengths):
                raise KeyboardInterrupt
            super().update(*args, **kwargs)

    layer = scales.layers[0]
    strengths = dict(layer.scaling)
    layer.scaling = Interrupted(strengths)
    with pytest.raises(KeyboardInterrupt), scales.applied():
        pass
    assert layer.scaling != strengths
    layer.scaling = dict(layer.scaling)
    with AdapterScales(pipe.transformer, 0.5).applied():
        assert layer.scaling == {name: value * 0.5 for name, value in strengths.items()}
    assert layer.scaling == strengths
    equal(pipe, expected, ["image"])


OF_ANOTHER_KIND = [
    {"prompt": 5},
    {"negative_prompt": [3]},
    {"negative_prompt": 3},
    {"prompt": None, "prompt_embeds": np.zeros((1, 16, 32), np.float32)},
    {"prompt": None, "prompt_embeds": torch.zeros(16, 32)},
    {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 32, dtype=torch.int64)},
    {"latents": np.zeros((1, 16, 2, 4, 4), np.float32)},
    {"latents": [0.0]},
    {"latents": torch.zeros(1, 16, 2, 4, 4, dtype=torch.complex64)},
    {"generator": "5"},
    {"generator": [None]},
    {"generator": ("1",)},
    {"num_videos_per_prompt": None},
    {"mode": "storyboard", "num_moments": None},
    {"attention_kwargs": "x"},
    {"callback_on_step_end": 3},
    {"callback_on_stage_step": "print"},
    {"output_type": None},
    # Characters that a terminal would obey, or that no file holds.
    {"prompt": "a red \x1b[31m circle"},
    {"first_frame_prompt": "a red \udce9"},
    {"negative_prompt": "\ud800"},
    {"num_moments": 3},
    {"composer_negative_prompt": ["blue\x7f"]},
]


@pytest.mark.parametrize("change", OF_ANOTHER_KIND, ids=[str(number) for number in range(len(OF_ANOTHER_KIND))])
def test_a_value_of_another_kind_is_refused_before_a_model_runs(pipe, change, monkeypatch):
    untouched(pipe, monkeypatch)
    with pytest.raises(ValueError, match=f"`{list(change)[-1]}"):
        pipe(**{"prompt": PROMPT, **CALL, **change})


def test_tuples_of_texts_and_callbacks_without_an_answer_are_fine(pipe, expected):
    call = {**CALL, "mode": "direct", "generator": seeded(2)}
    frames = pipe(
        (PROMPT,), callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=None, **call
    ).frames
    assert torch.equal(frames, expected["direct"])
    pipe((PROMPT,), negative_prompt=("blue",), **CALL)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.5, None, "2"])
def test_moments_are_a_whole_number(pipe, value):
    with pytest.raises(ValueError, match="num_moments"):
        pipe.storyboard(PROMPT, num_moments=value)


@pytest.mark.parametrize(
    "anchor",
    [{"frame_index": 2.5}, {"frame_index": "0"}, {"frame_index": None}, {"strength": None}, {"strength": "1"}],
)
def test_an_anchor_of_another_kind_is_refused(anchor):
    with pytest.raises(ValueError, match=list(anchor)[0]):
        Anchor(picture(), **anchor)
    assert Anchor(picture(), np.int64(2), np.float32(0.5)).strength == 0.5


@pytest.mark.parametrize("window", [float("nan"), -1, 2.5, True])
def test_a_preset_s_window_is_a_whole_number(window):
    with pytest.raises(ValueError, match="anchor_window"):
        unipc_preset("bad", 3, 5.0, 5.0, "this test", anchor_window=window)


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_defaults_that_are_not_finite_are_refused(pipe, value):
    with pytest.raises(ValueError, match="`num_inference_steps=.*must be a whole number"):
        AnchorComposer(pipe.composer.pipeline, {"num_frames": 1, "num_inference_steps": value})
    with pytest.raises(ValueError, match="frame_rate.*finite"):
        tiny_pipeline(call_defaults={"frame_rate": value})


def test_defaults_are_a_dictionary():
    with pytest.raises(ValueError, match="`call_defaults` must be a dictionary .* but is 'x'"):
        tiny_pipeline(call_defaults="x")
