"""Memory profiles: the arithmetic against what is counted elsewhere, and stages that come and go."""

import copy
import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLWan
from group_offload import skip_without_group_offload
from PIL import Image
from test_placement import SIZE, present, run, two_experts, walk  # noqa: F401
from tiny import tiny_pipeline
from tiny_cogvideox import tiny_cogvideox_pipeline
from tiny_dreamer import tiny_dreamer_pipeline
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_fvg import AnchorLora
from diffusers_fvg.animate import decoding, memory
from diffusers_fvg.animate.decoding import decode_chunks
from diffusers_fvg.animate.memory import decode_bytes, free_bytes
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.animate.transformer_anchor_cogvideox import AnchorConditionedCogVideoXTransformer3D
from diffusers_fvg.dreamer.conditions import decode_latents
from diffusers_fvg.dreamer.unet import FactorizedDreamerUNet
from diffusers_fvg.models import MODELS
from diffusers_fvg.pipelines import profiles
from diffusers_fvg.pipelines.profiles import (
    GIB,
    MemoryPlan,
    Stage,
    apply_memory_profile,
    model_stages,
    pipeline_stages,
    place,
    plan_memory,
)


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
from harness import SIZES, LiveBytes, build_transformer, transformer_inputs  # noqa: E402


@pytest.fixture(scope="module")
def real() -> dict[str, list[Stage]]:
    return {name: model_stages(MODELS[name]) for name in ("Wan2.2-TI2V-5B", "Wan2.2-T2V-A14B", "CogVideoX1.5-5B")}


def test_weights_are_those_of_the_published_models(real):
    # UMT5-XXL's encoder: an embedding, 24 layers of 4 attention and 3 feed-forward matrices, 2 norms, position bias; norm.
    umt5 = 256384 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64) + 4096
    for name, stages in real.items():
        weights = {stage.name: stage.weights for stage in stages}
        # T5-XXL's has another vocabulary, and position biases in its first layer alone.
        t5 = umt5 - (256384 - 32128) * 4096 - 23 * 32 * 64
        assert weights["text_encoder"] == 2 * (t5 if name.startswith("CogVideoX") else umt5)
        for expert in weights.keys() & {"transformer", "transformer_2"}:
            # And the rotary embedding's cosines and sines of 1024 positions, in float32; CogVideoX makes them in each call.
            rotary = 0 if name.startswith("CogVideoX") else 2 * 1024 * 128 * 4
            assert weights[expert] == 2 * MODELS[name].parameters + rotary
    assert [stage.name for stage in real["Wan2.2-T2V-A14B"]] == ["text_encoder", "transformer", "transformer_2", "vae"]


# Computed, in GiB: what is there at once, and the card's size less a tenth.
@pytest.mark.parametrize(
    "model, profile, offload, tile, peak",
    [
        ("Wan2.2-TI2V-5B", "8GB", "group", True, 5.4),
        ("Wan2.2-TI2V-5B", "12GB", "group", False, 10.8),
        ("Wan2.2-TI2V-5B", "20.5 gb", "group", False, 10.8),
        ("Wan2.2-TI2V-5B", "24GB", "model", False, 21.3),
        ("Wan2.2-TI2V-5B", "48GB", "none", False, 30.7),
        ("Wan2.2-TI2V-5B", "80GB", "none", False, 30.7),
        ("Wan2.2-T2V-A14B", "24GB", "group", False, 12.9),
        ("Wan2.2-T2V-A14B", "48GB", "model", False, 37.7),
        ("Wan2.2-T2V-A14B", "80GB", "model", False, 37.7),
        ("CogVideoX1.5-5B", "8GB", "group", True, 5.3),
        ("CogVideoX1.5-5B", "24GB", "model", True, 15.2),
        # 9.52, 11.14 and 0.43 GB of weights, and 20 numbers of 2 bytes for 9 frames of 128 channels at 768 x 1360.
        ("CogVideoX1.5-5B", "80GB", "none", False, 64.5),
    ],
)
def test_largest_stage_fits(real, model, profile, offload, tile, peak):
    plan = plan_memory(real[model], profile)
    assert (plan.offload, plan.tile) == (offload, tile)
    assert plan.peak / GIB == pytest.approx(peak, abs=0.06)
    assert plan.peak <= 0.9 * float(profile.upper().removesuffix("GB")) * GIB
    assert f"offload {offload}" in str(plan) and "computed" in str(plan)


def test_what_does_not_fit_is_refused_with_its_size(real):
    with pytest.raises(
        ValueError, match=r"'12GB' may take 10.8 GiB, but `transformer\w*` needs 12.9 GiB .*fewer pixels"
    ):
        plan_memory(real["Wan2.2-T2V-A14B"], "12GB")
    for wrong in ("16", "much", "0GB", "-4GB", "nanGB", "1e20GB", "16TB", ""):
        with pytest.raises(ValueError, match=f'\'{wrong}\' is not a size: use one such as "16GB", "auto" or "cpu"'):
            plan_memory(real["Wan2.2-T2V-A14B"], wrong)


def test_plan_of_given_numbers():
    stages = [Stage("text_encoder", 100, 20, 5), Stage("transformer", 60, 10, 30), Stage("vae", 10, 10, 50, 8)]
    expected = {
        # All weights and the largest room; text encoder, VAE and its room; VAE and its room; with tiles that of layers.
        220: ("none", False, 220),
        219: ("model", False, 160),
        159: ("group", False, 60),
        59: ("group", True, 50),
    }
    for budget, (offload, tile, peak) in expected.items():
        plan = plan_memory(stages, "12GB", budget)
        assert (plan.offload, plan.tile, plan.peak) == (offload, tile, peak)
    with pytest.raises(ValueError, match="`transformer`"):
        plan_memory(stages, "12GB", 49)
    with pytest.raises(ValueError, match="cpu"):
        plan_memory(stages, "cpu", 199)
    # One whose layers are another package's comes as a whole.
    whole = [dataclasses.replace(stage, whole=stage.name == "transformer") for stage in stages]
    assert plan_memory(whole, "12GB", 159).offload == "model"
    # A stage by itself.
    assert [plan_memory(stages[:1], "12GB", budget).offload for budget in (105, 104)] == ["none", "group"]


@pytest.mark.parametrize("name", ["5b", "a14b"])
def test_room_of_a_forward_is_that_of_its_live_tensors(name):
    size = dataclasses.replace(SIZES[name], config=SIZES[name].config | {"num_layers": 1})
    with FakeTensorMode(), torch.no_grad():
        model = build_transformer(AnchorConditionedTransformer3D, size, "cpu")
        inputs = transformer_inputs(size, "cpu", per_token=False)
        with LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as counter:
            model(**inputs)
        shape = tuple(inputs["hidden_states"].shape)
        assert counter.peak <= profiles._transformer_working(model, shape) <= 1.7 * counter.peak


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux's own count")
def test_the_cache_of_files_is_free_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_OF_PROCESS", tmp_path / "no limits")

    def available() -> int:
        (line,) = re.findall(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return 1024 * int(line)

    before, told, after = available(), free_bytes(torch.device("cpu")), available()
    assert min(before, after) - 2**28 < told < max(before, after) + 2**28


# Of each group: limit, usage, and how much of this is cache that was not used lately, in MiB.
@pytest.mark.parametrize(
    "lines, groups, free",
    [
        ("0::/", {"": (100, 60, 20)}, 60),
        ("0::/job_7/step_0", {"job_7": (50, 45, 5), "job_7/step_0": ("max", 40, 5)}, 10),
        ("0::/job_7", {"job_7": (50, 60, 0)}, 0),
        ("0::/job_7", {"job_7": ("max", 60, 0)}, None),
        ("9:cpu:/\n4:cpuacct,memory:/docker/6b40\n0::/", {"memory": (100, 60, 20)}, 60),
        ("4:memory:/docker/6b40", {"memory": (2**44, 90, 0), "memory/docker/6b40": (100, 90, 0)}, 10),
    ],
)
def test_the_limit_of_a_container_counts(lines, groups, free, tmp_path, monkeypatch):
    """Files as Linux' documentation of both versions of control groups has them."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OF_PROCESS", tmp_path / "self")
    (tmp_path / "self").write_text(lines + "\n")
    for name, numbers in groups.items():
        limit, usage, cache = (number if number == "max" else str(number * 2**20) for number in numbers)
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        is_first = name.startswith("memory")
        names = (
            ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
            if is_first
            else ("max", "current", "inactive_file")
        )
        (tmp_path / name / f"memory.{names[0]}").write_text(limit + "\n")
        (tmp_path / name / f"memory.{names[1]}").write_text(usage + "\n")
        (tmp_path / name / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\nfile 2\n")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
    assert free_bytes(torch.device("cpu")) == (2**40 if free is None else free * 2**20)


@pytest.mark.parametrize("channels", profiles.WAN_VAES)
def test_room_of_a_decode_is_that_of_its_live_tensors(channels, monkeypatch):
    # Tensors without values cannot be asked whether they are finite.
    monkeypatch.setattr(decoding, "stop_unless_finite", lambda *_: None)
    latents = (1, channels, 3, 6, 5)
    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKLWan(**profiles.WAN_VAES[channels]).eval()
        given = torch.zeros(latents)
        with LiveBytes([*vae.parameters(), given]) as counter:
            for _ in decode_chunks(vae, given, lambda pixels: pixels.to(torch.uint8)):
                pass
    assert counter.peak <= decode_bytes(vae.config, latents, 4) <= 1.2 * counter.peak


@pytest.mark.slow
def test_room_of_cogvideox_is_that_of_its_live_tensors(monkeypatch):
    monkeypatch.setattr(decoding, "stop_unless_finite", lambda *_: None)
    config = MODELS["CogVideoX1.5-5B"].transformer_config | {"num_layers": 1}
    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKLCogVideoX(**profiles.COGVIDEOX_VAE).eval()
        model = AnchorConditionedCogVideoXTransformer3D(**config).eval()
        # 81 frames of 768 x 1360, padded to patches of two latent frames.
        hidden_states, text = torch.zeros(1, 22, 16, 96, 170), torch.zeros(1, 224, 4096)
        rotary = model.rotary_embedding(22, 96, 170, device="cpu")
        with LiveBytes([*model.parameters(), *model.buffers(), hidden_states, text, *rotary]) as counter:
            model(hidden_states, text, torch.zeros(1), image_rotary_emb=rotary)
        assert counter.peak <= profiles._stage("transformer", model, vae, 768, 1360, 81).working <= 1.4 * counter.peak
        for tile, height, width in ((None, 16, 16), (86400, 40, 50)):
            vae.use_tiling = tile is not None
            latents = (1, 16, 5, height, width)
            given = torch.zeros(latents)
            with LiveBytes([*vae.parameters(), given]) as counter:
                for _ in decode_chunks(vae, given, lambda pixels: pixels.to(torch.uint8)):
                    pass
            assert counter.peak <= decode_bytes(vae.config, latents, 4, tile) <= 1.1 * counter.peak


@pytest.mark.slow
def test_room_of_factorized_dreamer_is_that_of_its_live_tensors():
    channels = (64, 128, 128, 128)
    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
        ).eval()
        unet = FactorizedDreamerUNet(cross_attention_dim=64, block_out_channels=channels, num_frames=8).eval()
        known = {"image_latents": torch.zeros(1, 4, 32, 32), "image_embeds": torch.zeros(1, 1024)}
        known |= {"motion_embeds": torch.zeros(1, 77, 2048), "image_mask": torch.ones(1)}
        known |= {"sample": torch.zeros(1, 4, 8, 32, 32), "encoder_hidden_states": torch.zeros(1, 77, 64)}
        with LiveBytes([*unet.parameters(), *unet.buffers(), *known.values()]) as counter:
            unet(timestep=torch.tensor(1), **known)
        assert counter.peak <= profiles._stage("unet", unet, vae, 256, 256, 8).working <= 1.4 * counter.peak
        latents = torch.zeros(8, 4, 32, 32)
        with LiveBytes([*vae.parameters(), latents]) as counter:
            decode_latents(vae, latents)
        room = profiles._stage("vae", vae, vae, 256, 256, 8).working
        assert counter.peak <= room <= 1.3 * counter.peak


# -- a pipeline of all stages -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected():
    return run(two_experts())


def sizes(pipe) -> dict[str, int]:
    """Bytes of each component."""
    bytes_of = dict.fromkeys((name.split(".")[0] for name in walk(pipe)), 0)
    for name, tensor in walk(pipe).items():
        bytes_of[name.split(".")[0]] += tensor.nbytes
    return bytes_of


def of_size(pipe) -> list[Stage]:
    return pipeline_stages(pipe, SIZE["height"], SIZE["width"], SIZE["num_frames"])


def apply(pipe, monkeypatch, budget: float):
    """The 12 GB profile, as if the card had `budget` bytes for use, and with no allowance: the models here are tiny."""
    monkeypatch.setattr(profiles, "ALLOWANCE", 0)
    monkeypatch.setattr(profiles, "memory_bytes", lambda profile: budget / profiles.USABLE + 1)
    return apply_memory_profile(pipe, "12GB", "cpu:0", SIZE["height"], SIZE["width"], SIZE["num_frames"])


def test_model_offload_has_the_largest_stage_at_once_and_not_the_sum(present, expected, monkeypatch):  # noqa: F811
    pipe = two_experts()
    weights = sizes(pipe)
    stages = {stage.name: stage for stage in of_size(pipe)}
    plan = apply(pipe, monkeypatch, sum(weights.values()) + stages["vae"].working - 1)
    assert plan.offload == "model"
    torch.testing.assert_close(run(pipe).frames, expected.frames, rtol=0, atol=1e-5)
    vae = weights.pop("vae")
    # The composer ends before the VAE is needed.
    beside = {name: value + (0 if name in ("rewriter", "composer") else vae) for name, value in weights.items()}
    assert present.peak == max(beside.values()) < 0.6 * sum(weights.values())
    assert not list(present)


def test_group_offload_has_a_few_layers_at_once(present, expected, monkeypatch):  # noqa: F811
    skip_without_group_offload()
    pipe = two_experts()
    monkeypatch.setattr(profiles, "ALLOWANCE", 0)
    stages = {stage.name: stage for stage in of_size(pipe)}
    plan = apply(pipe, monkeypatch, stages["vae"].weights + stages["vae"].working)
    assert plan.offload == "group"
    torch.testing.assert_close(run(pipe).frames, expected.frames, rtol=0, atol=1e-5)
    layers = max(stage.layers for name, stage in stages.items() if name != "vae")
    assert 0 < present.peak <= layers < max(sizes(pipe).values())
    assert not list(present)


def test_everything_stays_where_it_fits(present, expected, monkeypatch):  # noqa: F811
    pipe = two_experts()
    plan = apply(pipe, monkeypatch, 1 << 40)
    assert (plan.offload, plan.tile, pipe.vae.use_tiling) == ("none", False, False)
    torch.testing.assert_close(run(pipe).frames, expected.frames, rtol=0, atol=1e-5)
    assert present.peak == 0


def test_cpu_tiles_only_what_would_not_fit(monkeypatch):
    pipe = two_experts()
    monkeypatch.setattr(profiles, "ALLOWANCE", 0)
    plan = apply_memory_profile(pipe, "cpu", num_frames=5)
    assert (plan.offload, plan.tile, pipe.vae.use_tiling) == ("none", False, False)
    vae = plan.stages[-1]
    monkeypatch.setattr(profiles, "free_bytes", lambda device: vae.working - 1)
    assert apply_memory_profile(pipe, "cpu", num_frames=5).tile and pipe.vae.use_tiling


def test_fewer_bits_are_planned_as_fewer_bytes():
    pipe = two_experts()
    before = {stage.name: stage.weights for stage in of_size(pipe)}
    # Stored in 8 bits of float, as diffusers offers without another package.
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    after = {stage.name: stage.weights for stage in of_size(pipe)}
    assert after["transformer"] < 0.6 * before["transformer"]
    assert {name: value for name, value in after.items() if name != "transformer"} == {
        name: value for name, value in before.items() if name != "transformer"
    }


@pytest.mark.parametrize(("make", "size"), [(tiny_cogvideox_pipeline, 9), (tiny_dreamer_pipeline, 4)])
@pytest.mark.parametrize("offload", ["model", "group"])
def test_every_class_is_placed(make, size, offload, present):  # noqa: F811
    if offload == "group":
        skip_without_group_offload()
    options = {
        "height": 16,
        "width": 16,
        "num_frames": size,
        "num_inference_steps": 1,
        "image": Image.new("RGB", (16, 16)),
    }
    results = []
    for way in ("none", offload):
        # Some of its components are shared among tests.
        pipe = copy.deepcopy(make())
        pipe.set_progress_bar_config(disable=True)
        stages = pipeline_stages(pipe, 16, 16, size)
        assert [stage.name for stage in stages][-1] == "vae" and all(stage.working > 0 for stage in stages)
        place(pipe, MemoryPlan("12GB", 0, way, False, tuple(stages)), "cpu:0")
        results.append(pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).frames)
    assert present.peak > 0
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-5)


def test_anchors_behind_the_clip_are_planned():
    pipe = tiny_pipeline()
    # Latent frames of 9 frames, of 2 x 2 patches each, 24 wide with feed-forwards of 32.
    per_frame = 2 * 2 * (3 * 32 + 7 * 24) * 4

    def working(num_anchors):
        stages = {stage.name: stage for stage in pipeline_stages(pipe, 32, 32, 9, num_anchors)}
        return stages["transformer"].working / per_frame

    assert working(2) == 3
    pipe.anchor_lora = AnchorLora({}, {"anchor_form": "appended"})
    assert [working(count) for count in (0, 1, 2)] == [3, 4, 5]
    plan = apply_memory_profile(pipe, "cpu", None, 32, 32, 9, num_anchors=4)
    assert {stage.name: stage.working for stage in plan.stages}["transformer"] == 7 * per_frame


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what is said where there is none")
def test_no_accelerator():
    with pytest.raises(ValueError, match="'80GB' is for an accelerator.*\"cpu\""):
        apply_memory_profile(two_experts(), "80GB")


def test_readme_s_table_is_what_is_planned(real):
    words = {"none": "all", "model": "stages", "group": "layers"}
    readme = (Path(profiles.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (Wan2\.2-\S+), \d+x\d+, \d+ frames \| (.*) \|$", readme, re.MULTILINE)
    assert len(rows) == 2
    for model, cells in rows:
        for profile, cell in zip(("12GB", "24GB", "48GB", "80GB"), cells.split(" | "), strict=True):
            try:
                plan = plan_memory(real[model], profile)
            except ValueError:
                assert cell == "refused"
                continue
            assert cell == f"{words[plan.offload]}, {plan.peak / GIB:.1f} GiB"


def test_sizes_of_memory_have_units():
    assert profiles.memory_bytes("8192MB") == profiles.memory_bytes("8 GiB") == 8 * 2**30
