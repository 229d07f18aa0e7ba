import getpass
import hashlib
import json
import socket
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler
from diffusers.utils.torch_utils import randn_tensor
from test_rewriter import ChatServer, reply
from tiny import tiny_pipeline, tiny_transformer
from tiny_cogvideox import tiny_cogvideox_pipeline
from tiny_dreamer import tiny_dreamer_pipeline

from diffusers_fvg import Anchor, ChatEndpoint, FirstFrameRewriter, Moment, read_record, replay
from diffusers_fvg.media import write_video
from diffusers_fvg.pipelines.record import surroundings
from diffusers_fvg.pipelines.replay import check_record, differences, recorded_call
from diffusers_fvg.pipelines.seeds import restored_draws, video_seeds


PROMPT = "a red circle moves to the right"
SIZE = {"height": 32, "width": 32, "num_frames": 9, "output_type": "pt", "num_inference_steps": 2}
PIPELINES = {"wan": tiny_pipeline, "cogvideox": tiny_cogvideox_pipeline, "dreamer": tiny_dreamer_pipeline}
BOARD = [Moment("a red circle", 0.0), Moment("a blue circle", 1.0)]
CALLS = {
    "factorized": {},
    "direct": {"mode": "direct", "guidance_scale": 3.0, "negative_prompt": "blurry"},
    "caption": {"first_frame_prompt": "a blue circle", "composer_num_inference_steps": 1, "preset": "full-50"},
    "storyboard": {"mode": "storyboard", "storyboard": BOARD, "attention_kwargs": {"scale": 0.5}},
}


@pytest.fixture(scope="module")
def pipes():
    pipes = {name: make() for name, make in PIPELINES.items()}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture
def pipe(pipes):
    return pipes["wan"]


@pytest.fixture
def told(monkeypatch):
    """What is logged as a warning."""
    found = []
    monkeypatch.setattr("diffusers_fvg.pipelines.replay.logger.warning", found.append)
    return found


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def in_a_file(record: dict) -> dict:
    return json.loads(json.dumps(record))


@pytest.fixture(scope="module")
def record(pipes):
    return pipes["wan"](PROMPT, generator=seeded(), **SIZE).records[0]


# -- a record makes its video again -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *((name, call) for name in ("wan", "cogvideox") for call in CALLS),
        ("dreamer", "factorized"),
        ("dreamer", "direct"),
    ],
)
def test_a_record_makes_its_video_again(name, call, pipes, told):
    out = pipes[name](PROMPT, generator=seeded(3), **SIZE, **CALLS[call])
    again = replay(pipes[name], in_a_file(out.records[0]), output_type="pt")
    assert torch.equal(out.frames, again.frames) and told == []
    assert again.records == out.records and again.seeds == out.seeds and out.seeds[0]["video"] == 3
    if call == "direct":
        # Sensitive to what it tests: another seed is another video.
        other = replay(pipes[name], out.records[0], output_type="pt", generator=seeded(4))
        assert not torch.equal(other.frames, out.frames)


def test_a_record_says_what_was_asked_for_and_what_was_settled(record):
    assert (record["prompt"], record["mode"], record["first_frame_prompt"]) == (PROMPT, "factorized", PROMPT)
    # Of the preset: arXiv 2512.16371 and Wan2.2's own guidance.
    assert (record["preset"], record["num_inference_steps"], record["guidance_scale"]) == ("anchored-15", 2, 5.0)
    assert record["composer"]["num_inference_steps"] == 2 and record["composer"]["pipeline"] == "WanPipeline"
    assert (record["device"], record["dtypes"]["transformer"]) == ("cpu", "float32")
    assert record["versions"]["torch"] == torch.__version__


def test_weights_in_fewer_bits_and_tiles_are_recorded():
    pipe = tiny_pipeline()
    assert (surroundings(pipe)["quantization"], surroundings(pipe)["vae_tiling"]) == ({}, False)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe.vae.enable_tiling()
    here = surroundings(pipe)
    assert (here["quantization"], here["vae_tiling"]) == ({"transformer": "float8_e4m3fn"}, True)


def test_a_tuple_ends_with_the_records(pipes):
    for pipe in (pipes["wan"], pipes["dreamer"]):
        *_, records = pipe(PROMPT, mode="direct", return_dict=False, **SIZE)
        assert records[0]["pipeline"] == type(pipe).__name__


def test_each_expert_is_guided_as_it_was(told):
    pipe = tiny_pipeline(transformer_2=tiny_transformer(seed=5), boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(PROMPT, mode="direct", generator=seeded(), guidance_scale=4.0, guidance_scale_2=3.0, **SIZE)
    assert (out.records[0]["guidance_scale"], out.records[0]["guidance_scale_2"]) == (4.0, 3.0)
    assert torch.equal(replay(pipe, out.records[0], output_type="pt").frames, out.frames)


# -- generators -------------------------------------------------------------------------------------------------------


def test_a_generator_used_twice_records_what_it_really_drew(pipe, told):
    generator = seeded()
    first, second = (pipe(PROMPT, generator=generator, **SIZE) for _ in range(2))
    assert first.seeds[0]["video"] == 0 and second.seeds[0]["video"].keys() == {"device", "state"}
    assert not torch.equal(first.frames, second.frames)
    again = replay(pipe, in_a_file(second.records[0]), output_type="pt")
    assert torch.equal(again.frames, second.frames) and again.records == second.records and told == []


def test_a_state_restores_all_that_is_drawn(pipe, told):
    """Noise of weak anchors, and what a scheduler draws in its steps."""
    own = tiny_pipeline(scheduler=FlowMatchLCMScheduler(shift=3.0))
    own.set_progress_bar_config(disable=True)
    generator = seeded()
    torch.randn(7, generator=generator)
    anchors = [Anchor(picture(), 0, 0.7), Anchor(picture(1), -1)]
    out = own(PROMPT, anchors=anchors, generator=generator, **SIZE)
    again = replay(own, in_a_file(out.records[0]), [picture(), picture(1)], output_type="pt")
    assert torch.equal(again.frames, out.frames) and out.records[0]["scheduler"]["class"] == "FlowMatchLCMScheduler"


@pytest.mark.parametrize("kind", ["shared", "used", "repeated", "own"])
def test_each_video_of_a_batch_has_its_noise_again(kind):
    shape = (3, 4, 3, 5, 7)
    generator = seeded(5)
    if kind == "used":
        torch.randn(3, generator=generator)
    given = {"repeated": [generator] * 3, "own": [seeded(seed) for seed in range(3)]}.get(kind, generator)
    seeds = in_a_file(video_seeds(given, 3))
    noise = randn_tensor(shape, given)
    for video, seed in enumerate(seeds):
        draws = restored_draws(seed, (1, *shape[1:]), torch.device("cpu"))
        own = draws.get("latents")
        own = randn_tensor((1, *shape[1:]), draws["generator"]) if own is None else own
        assert torch.equal(own[0], noise[video])


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_each_video_of_a_batch_has_a_record_of_its_own(pipe, kind, told):
    given = seeded(5) if kind == "shared" else [seeded(seed) for seed in range(4)]
    prompts = [PROMPT, "a blue square moves up"]
    out = pipe(prompts, negative_prompt=["a", "b"], generator=given, num_videos_per_prompt=2, **SIZE)
    for video in (0, 3):
        record = in_a_file(out.records[video])
        assert record["prompt"] == prompts[video // 2] and prompts[1 - video // 2] not in json.dumps(record)
        again = replay(pipe, record, output_type="pt")
        # A batch rounds in another order than a video alone.
        assert (again.frames[0] - out.frames[video]).abs().max() < 1e-4
        assert (again.frames[0] - out.frames[video - 1]).abs().max() > 1e-2
        assert again.seeds[0] == out.seeds[video] and again.records[0]["not_recorded"] == []


def test_what_a_shared_generator_drew_later_is_told(pipe, told):
    out = pipe(PROMPT, anchors=Anchor(picture(), 0, 0.5), generator=seeded(), num_videos_per_prompt=2, **SIZE)
    replay(pipe, out.records[1], picture())
    assert len(told) == 1 and "its generator was shared" in told[0]


@pytest.mark.parametrize("device", ["cpu", "cuda", "banana"])
def test_a_state_that_is_none_is_refused(device):
    """torch itself takes one from which it would read beyond its table."""
    (seed,) = video_seeds(seeded(), 1)
    generator = seeded()
    torch.randn(1, generator=generator)
    state = generator.get_state()
    state[8:12], state[16:24] = torch.tensor([112, 2, 0, 0]), torch.tensor([112, 2, 0, 0, 0, 0, 0, 0])
    (hostile,) = video_seeds(generator.set_state(state), 1)
    with pytest.raises(ValueError, match="cannot be restored here"):
        restored_draws(hostile | {"device": device}, (1, 4), torch.device("cpu"))


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_given_pictures_are_given_again(pipe, told):
    run = [picture(seed) for seed in range(4)]
    anchors = [Anchor(picture(9)), Anchor(run, 5)]
    out = pipe(PROMPT, anchors=anchors, generator=seeded(), **SIZE)
    entry = out.records[0]["anchors"][0]
    assert entry["sha256"] == [hashlib.sha256(np.asarray(picture(9)).tobytes()).hexdigest()]
    record = in_a_file(out.records[0])
    assert torch.equal(replay(pipe, record, [picture(9), run], output_type="pt").frames, out.frames)
    for images, message in (
        (None, "2 given picture.*--image"),
        (picture(9), "1 entries for a record of 2"),
        ([picture(8), run], "Picture 1 is another one"),
        ([picture(9), run[::-1]], "Picture 2 is another one"),
    ):
        with pytest.raises(ValueError, match=message):
            replay(pipe, record, images)


def test_tensors_are_given_again(pipe, told):
    latents = torch.randn(pipe._latents_shape(1, 9, 32, 32), generator=seeded(2))
    out = pipe(PROMPT, latents=latents, generator=seeded(), **SIZE)
    with pytest.raises(ValueError, match="made with `latents`"):
        replay(pipe, out.records[0])
    assert torch.equal(replay(pipe, out.records[0], latents=latents, output_type="pt").frames, out.frames)


# -- changes ----------------------------------------------------------------------------------------------------------


def test_changes_replace_what_depends_on_them(pipe, record, told):
    prompt = "a blue square moves up"
    new = replay(pipe, record, prompt=prompt).records[0]
    assert (new["prompt"], new["first_frame_prompt"], new["seeds"]) == (prompt, prompt, record["seeds"])
    new = replay(pipe, record, image=picture()).records[0]
    assert new["first_frame_prompt"] is None and len(new["anchors"]) == 1
    assert replay(pipe, record, mode="direct").records[0]["anchors"] == []
    new = replay(pipe, record | {"guidance_scale": 3.0}, preset="full-50", num_inference_steps=3).records[0]
    assert (new["preset"], new["num_inference_steps"], new["guidance_scale"]) == ("full-50", 3, 5.0)
    with pytest.raises(ValueError, match="`images` are for a record of pictures that were given"):
        replay(pipe, record, picture())


def test_what_differs_is_told(pipe, record, told):
    other = record | {"device": "cuda", "versions": record["versions"] | {"torch": "1.0"}, "model": "org/fvg"}
    other |= {"hub_revisions": {"vae": "org/vae@" + "0" * 40, "rewriter": "org/chat@main"}}
    other |= {"dtypes": record["dtypes"] | {"vae": "bfloat16"}, "adapters": {"transformer": {"anchor": 0.5}}}
    other |= {"composer": record["composer"] | {"num_inference_steps": 9}}
    other |= {"anchors": [record["anchors"][0] | {"sha256": ["0" * 64]}]}
    replay(pipe, other)
    for words in (
        "model 'org/fvg', here",
        "device 'cuda', here 'cpu'",
        "versions torch '1.0'",
        "hub_revisions vae 'org/vae@0000",
        "dtypes vae 'bfloat16', here 'float32'",
        "adapters transformer {'anchor': 0.5}, here None",
        "composer num_inference_steps 9, here 2",
    ):
        assert words in told[0], words
    assert "org/chat" not in told[0] and "drew another image" in told[1] and len(told) == 2


def test_another_lora_of_the_same_name_is_told(told):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(_lora(pipe), adapter_name="style")
    record = pipe(PROMPT, mode="direct", generator=seeded(), **SIZE).records[0]
    assert not [line for line in differences(pipe, record) if "adapter" in line]
    pipe.delete_adapters("style")
    pipe.load_lora_weights({name: 2 * tensor for name, tensor in _lora(pipe).items()}, adapter_name="style")
    (line,) = differences(pipe, record)
    assert "adapter_hashes transformer" in line and record["adapters"] == {"transformer": {"style": 1.0}}


@pytest.mark.parametrize(
    ("change", "way_out", "words"),
    [
        ({"max_sequence_length": 2000}, {"max_sequence_length": 16}, "`max_sequence_length=2000`.* at most 512"),
        ({"height": 8192, "width": 8192, "num_frames": 9}, {"height": 32, "width": 32}, "603979776 pixels in all"),
    ],
)
def test_a_record_beyond_the_models_own_is_refused(pipe, record, told, change, way_out, words):
    with pytest.raises(ValueError, match=words):
        replay(pipe, record | change)
    replay(pipe, record | change, **way_out)


@pytest.mark.parametrize("given", ["a.mp4", None, [{}], {}])
def test_what_is_no_record_is_said(pipe, given):
    with pytest.raises(ValueError, match="^`record` must be a dictionary from `read_record`"):
        replay(pipe, given)


def test_a_replay_returns_an_object(pipe, record):
    with pytest.raises(ValueError, match="`return_dict=False`"):
        replay(pipe, record, return_dict=False)


def test_more_moments_are_written_anew(record):
    board = [{"caption": "a red circle", "time": 0.0}, {"caption": "a blue circle", "time": 1.0}]
    told = record | {"mode": "storyboard", "storyboard": board, "num_moments": 2}
    assert "storyboard" in recorded_call(told, None, {"num_moments": 2})
    assert "storyboard" not in recorded_call(told, None, {"num_moments": 3})


def test_a_record_of_another_class_is_refused(pipes, record):
    with pytest.raises(
        ValueError, match="is of a FactorizedVideoPipeline, but `pipe` is a FactorizedCogVideoXPipeline"
    ):
        replay(pipes["cogvideox"], record)


# -- a stranger's record ----------------------------------------------------------------------------------------------


HOSTILE = {
    "version": {"record_version": 2},
    "unknown key": {"trust_remote_code": True},
    "unknown key of a seed": {"seeds": {"video": {"seed": 0, "code": "x"}}},
    "path": {"model": "/etc/passwd"},
    "path upwards": {"model": "../model"},
    "url": {"model": "https://host/model"},
    "windows path": {"model": "C:\\model"},
    "path in a revision": {"hub_revisions": {"anchor_lora": "../lora"}},
    "url in a revision": {"hub_revisions": {"vae": "http://host/x"}},
    "size": {"height": 10**9},
    "pixels": {"height": 8192, "width": 8192, "num_frames": 100},
    "videos": {"seeds": {"video": {"seed": 0, "index": 0, "of": 10**7}}},
    "place": {"seeds": {"video": {"seed": 0, "index": 3, "of": 2}}},
    "guidance": {"guidance_scale": -5},
    "frames per second": {"fps": -3},
    "tokens": {"max_sequence_length": 100_000},
    "kind of model": {"model_kind": "code"},
    "hash": {"adapter_hashes": {"transformer": {"anchor": "x"}}},
    "steps": {"num_inference_steps": 10**6},
    "kind": {"num_frames": "9"},
    "truth": {"height": True},
    "not a number": {"guidance_scale": float("nan")},
    "text": {"prompt": ["a"]},
    "no prompt": {"prompt": None},
    "long text": {"prompt": "a" * 100_000},
    "terminal": {"prompt": "a \x1b[2J"},
    "half a character": {"prompt": "a \ud800"},
    "mode": {"mode": ["direct"]},
    "no seeds": {"seeds": None},
    "negative seed": {"seeds": {"video": -1}},
    "two sources": {"seeds": {"video": {"seed": 0, "state": "x"}}},
    "time": {"storyboard": [{"caption": "a", "time": 7}]},
    "moment": {"storyboard": [{"caption": "a", "time": 0, "image": "/etc/passwd"}]},
    "anchor": {"anchors": [{"frame_index": 0, "strength": 1, "sha256": ["x"]}]},
    "class": {"pipeline": "os.system"},
    "argument": {"not_recorded": ["trust_remote_code"]},
    "scheduler": {"scheduler": "UniPCMultistepScheduler"},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_record_that_no_call_has_is_refused(record, change):
    check_record(record)
    with pytest.raises(ValueError, match="its record ") as error:
        check_record(record | change)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "comment",
    ["", "holiday", "[]", "{}", "[" * 100_000, '{"record_version": 1}', '{"record_version": ' + "9" * 5000 + "}"],
    ids=["none", "text", "list", "empty", "deep", "nothing else", "digits"],
)
def test_a_file_without_a_record_is_one_line(tmp_path, comment):
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="record|metadata") as error:
        read_record(path)
    assert "\n" not in str(error.value)


def test_a_playlist_by_the_name_of_a_video_is_not_followed(tmp_path, record):
    write_video(tmp_path / "real.mp4", np.zeros((1, 16, 16, 3), np.uint8), 8, record)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "real.mp4").read_bytes()[:600])
    with pytest.raises(ValueError, match="is not a video") as error:
        read_record(tmp_path / "cut.mp4")
    assert "\n" not in str(error.value)
    (tmp_path / "video.mp4").write_text("ffconcat version 1.0\nfile real.mp4\n")
    with pytest.raises(ValueError, match="is not a video"):
        read_record(tmp_path / "video.mp4")
    with pytest.raises(OSError):
        read_record(tmp_path / "missing.mp4")


# -- nothing of this machine ------------------------------------------------------------------------------------------


def test_a_file_says_nothing_of_this_machine(pipe, tmp_path, monkeypatch):
    key = "planted-key-of-some-length"
    monkeypatch.setenv("PLANTED_VARIABLE", key)
    home = tmp_path / "home" / "someone"
    pipe.save_pretrained(home / "models" / "my model")
    pipe.save_lora_weights(home / "secret_lora", transformer_lora_layers=_lora(pipe))
    with ChatServer(reply("a"), reply("a")) as server:
        endpoint = ChatEndpoint(server.url, str(home / "chat.gguf"), "PLANTED_VARIABLE")
        loaded = DiffusionPipeline.from_pretrained(
            home / "models" / "my model", rewriter=FirstFrameRewriter(endpoint=endpoint), composer=pipe.composer
        )
        loaded.load_lora_weights(home / "secret_lora", adapter_name="style")
        loaded.set_adapters("style", 0.25)
        loaded.set_progress_bar_config(disable=True)
        out = loaded(PROMPT, generator=seeded(), **SIZE)
    record = out.records[0]
    assert server.requests and record["adapters"] == {"transformer": {"style": 0.25}}
    assert (record["model"], record["rewriter"]) == ("my model", "chat.gguf")
    write_video(tmp_path / "video.mp4", out.frames[0], 8, record)
    assert read_record(tmp_path / "video.mp4") == record
    data = (tmp_path / "video.mp4").read_bytes()
    hidden = [key, "PLANTED_VARIABLE", str(tmp_path), "someone", "secret_lora", "127.0.0.1", server.url]
    hidden += [str(Path.home()), str(Path(__file__).parents[2])]
    # Short ones are among the pixels by chance.
    hidden += [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4]
    assert not [word for word in hidden if word.encode() in data]


def _lora(pipe) -> dict[str, torch.Tensor]:
    weight = pipe.transformer.blocks[0].attn1.to_q.weight
    name = "blocks.0.attn1.to_q"
    return {
        f"{name}.lora_A.weight": torch.ones(2, weight.shape[1]),
        f"{name}.lora_B.weight": torch.ones(len(weight), 2),
    }
