"""The benchmarks: their counts against arithmetic, that they run, and that their page agrees with their reports."""

import importlib
import importlib.util
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import harness  # noqa: E402
import render  # noqa: E402
from harness import SIZES, LiveBytes, at_full_depth, bar, count_flops, gate, interleaved_seconds  # noqa: E402

from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D  # noqa: E402


def test_page_is_what_the_reports_say():
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert page == render.page(render.RESULTS)
    for path in render.RESULTS.glob("*.json"):
        report = json.loads(path.read_text(encoding="utf-8"))
        assert f"## {report['benchmark']}\n" in page, path.name


def test_flops_are_those_of_the_products():
    size = SIZES["5b"]
    tokens, texts, width, ffn = 31 * 22 * 40, 512, 3072, 14336
    assert size.tokens == tokens
    # A block's query, key, value and output, the same of cross-attention but for two of text, feed-forward; attentions.
    linear = 2 * tokens * (6 * width**2 + 2 * width * ffn) + 2 * texts * 2 * width**2
    attention = 4 * tokens * (tokens + texts) * width
    outside = 2 * tokens * width * 48 * 4 * 2 + 2 * texts * (4096 + width) * width
    # The rest: times, 31 rows of them.
    expected = 30 * (linear + attention) + outside
    found = count_flops(AnchorConditionedTransformer3D, size, per_token=False)
    assert 0 <= found - expected < 1e-4 * expected


@torch.no_grad()
def test_an_appended_anchor_costs_a_latent_frame():
    size = SIZES["tiny"]
    model = harness.build_transformer(AnchorConditionedTransformer3D, size, "cpu")
    inputs = harness.transformer_inputs(size, "cpu", per_token=False)
    counted = []
    for values in (inputs, harness.with_appended_anchor(inputs)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            assert model(**values)[0].shape == inputs["hidden_states"].shape
        counted.append(counter.get_total_flops())
    longer = replace(size, latent_frames=size.latent_frames + 1)
    expected = [count_flops(AnchorConditionedTransformer3D, one, per_token=False) for one in (size, longer)]
    assert counted[0] == expected[0] and counted[1] == pytest.approx(expected[1], rel=0.02)
    # What the page says of the whole model.
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| time of a compiled step, one appended anchor"))
    for name in ("5b", "a14b"):
        longer = replace(SIZES[name], latent_frames=SIZES[name].latent_frames + 1)
        more, none = (
            count_flops(AnchorConditionedTransformer3D, one, per_token=False) for one in (longer, SIZES[name])
        )
        assert f"{more / none:.3f}" in row


def test_live_bytes():
    def call() -> None:
        one = torch.zeros(1000)
        two = one + 1
        del one
        two.view(10, 100).mul_(2)
        torch.zeros(250)

    known = torch.zeros(10_000)
    with LiveBytes([known]) as counter:
        known.mul_(2)
        call()
    assert counter.peak == 8000
    assert counter.live == 0


def test_gate_ends_a_run(capsys):
    expected = torch.tensor([3.0, 4.0])
    assert gate("same", expected + 0.025, expected, 0.01) == pytest.approx(0.025 / 12.5**0.5, rel=1e-4)
    for wrong in (-expected, expected * float("nan")):
        with pytest.raises(SystemExit, match="product: differs by .*nothing was timed"):
            gate("product", wrong, expected, 0.01)


def test_time_at_full_depth():
    # Two seconds once and three for each layer.
    assert at_full_depth(model=8.0, block=3.0, layers=2) == 92.0


@torch.no_grad()
def test_a_block_is_called_as_in_a_forward():
    size = SIZES["tiny"]
    model = harness.build_transformer(AnchorConditionedTransformer3D, size, "cpu")
    inputs, made = harness.transformer_inputs(size, "cpu", per_token=False), []
    call = harness.block_call(model, inputs)
    model.blocks[0].register_forward_hook(lambda *given: made.append(given[2]))
    model(**inputs)
    assert torch.equal(call(), made[0])


def test_memory_of_a_training_step_is_counted_as_it_is_used():
    from benchmark_training_step import Step, counted_memory

    counted = counted_memory(SIZES["tiny"], False)
    for name, (kept, peak) in counted.items():
        used = Step(name, SIZES["tiny"], "cpu", False).memory()
        assert (kept, peak) == pytest.approx(used, rel=0.05)
    assert counted["ours"][1] < counted["stock"][1]


def test_calls_come_in_turn():
    order = []
    seconds = interleaved_seconds({name: lambda name=name: order.append(name) for name in "ab"}, "cpu", 3)
    assert order == list("ab" * 4) and [len(values) for values in seconds.values()] == [3, 3]
    assert harness.median_ratio({"a": [1.0, 2.0, 9.0], "b": [2.0, 2.0, 3.0]}, "a", "b") == 1.0


def test_bars_and_cells():
    verdicts = [
        render.verdict(bar("time", 0.9, value, at_most=at_most, needs="a GPU"))
        for value, at_most in ((0.9, True), (0.91, True), (0.95, False), (None, False))
    ]
    assert verdicts == ["met", "missed", "met", "not run: needs a GPU"]
    assert [render.cell(value) for value in (None, True, 27280, 0.123456, 5198.2, "x")] == [
        *("-", "yes", "27,280", "0.123", "5,198", "x")
    ]


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("transformer_step", ["--no-compile"]),
        ("attention", []),
        ("forwards", []),
        ("pipeline", ["--model", "random"]),
        pytest.param("transformer_step", [], marks=pytest.mark.slow),
        pytest.param("training_step", [], marks=pytest.mark.slow),
        pytest.param("kernels", [], marks=pytest.mark.slow),
        pytest.param("loading", [], marks=pytest.mark.slow),
    ],
)
def test_script_runs_at_tiny_size(script, arguments, tmp_path, monkeypatch, capsys, quick_embedded):
    output, shapes = tmp_path / "report.json", SIZES["shapes"]
    small = replace(shapes, config=shapes.config | {"num_layers": 1}, latent_frames=2)
    monkeypatch.setitem(SIZES, "shapes", small)
    options = ["--size", "tiny", "--device", "cpu", "--repeats", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [script, *options, *arguments])
    module = importlib.import_module(f"benchmark_{script}")
    if script == "forwards":
        monkeypatch.setattr(module, "THRESHOLDS", (0.2,))
        monkeypatch.setattr(module, "STEPS", (2,))
    module.main()
    report = json.loads(output.read_text(encoding="utf-8"))
    assert render.section(report) in capsys.readouterr().out
    assert report["versions"]["torch"] == torch.__version__ and report["device"].startswith("cpu")
    # Times at these sizes mean nothing and decide no target, and neither do CPU times for a GPU.
    assert all(
        found["met"] is None for found in report["bars"] if "time" in found["figure"] or "GPU" in found["needs"]
    )
    assert report["runs"] and all(run.keys() == report["runs"][0].keys() for run in report["runs"])


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gpu_run_at_tiny_size(compiles, tmp_path, monkeypatch, capsys):
    """Each step writes its report; a step that fails or is late does not stop the run or lose earlier reports."""
    import gpu_run

    compiled, compile_blocks = [], gpu_run.Run.compile

    def compile_or_not(run, model):
        compiled.append(type(model).__name__)
        if compiles:
            compile_blocks(run, model)

    monkeypatch.setattr(gpu_run.Run, "compile", compile_or_not)
    if not compiles:
        monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: None)
    # A backend that a CPU has.
    monkeypatch.setattr(gpu_run, "choose_backend", lambda *_: "_native_math")

    def late(run):
        time.sleep(5)

    def failing(run):
        raise RuntimeError("no such kernel\nmore")

    steps = {name: (name, needs, limit, call) for name, needs, limit, call in gpu_run.STEPS}
    chosen = [("late", 1, 1, late), ("failing", 1, 9, failing)]
    names = ["steps", "attention_forms", "lora", "profile", "decode", "pipeline", "fast_pipeline", "stages"]
    names += ["fp8"] * (importlib.util.find_spec("torchao") is not None)
    chosen += [*(steps[name] for name in names), ("too_long", 10_000, 1, late)]
    if "fp8" in names:
        # It multiplies on a CPU too, but asks for a GPU.
        monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    monkeypatch.setattr(gpu_run, "STEPS", chosen)
    monkeypatch.setattr(sys, "argv", ["gpu_run", "--size", "tiny", "--device", "cpu", "--output", str(tmp_path)])
    gpu_run.main()
    # A forward of both classes, one with a LoRA, one in float8, and a video.
    ours = 3 + ("fp8" in names)
    assert Counter(compiled) == {"WanTransformer3DModel": 1, "AnchorConditionedTransformer3D": ours}
    text = capsys.readouterr().out
    assert "late: stopped at its limit" in text and "failing: RuntimeError: no such kernel after" in text
    assert "too_long: skipped" in text
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")}
    assert reports.keys() == set(names)
    ours = ["torch", "kernels, window 0", "kernels", "kernels, one appended anchor", "kernels, _native_math"]
    ours = [f"ours, {{}}, {way}" for way in ours]
    forwards = [
        name.format(how) for how in ("eager", "compiled") for name in ("stock, {}", "stock, {}, _native_math", *ours)
    ]
    assert [row["forward"] for row in reports["steps"]["runs"]] == forwards
    forms = [row["form"] for row in reports["attention_forms"]["runs"]]
    assert forms == ["dense, torch's choice", "dense, MATH", "window, gathered, MATH"]
    assert [row["LoRA"] for row in reports["lora"]["runs"]] == 2 * [
        "none",
        "rank 128, layers of its own",
        "rank 128, fused",
    ]
    assert 0 < reports["lora"]["settings"]["difference of the weights, relative"] < 1
    if "fp8" in names:
        plain, window, *quantized = reports["fp8"]["runs"]
        assert plain["relative difference"] is None
        assert all(1e-3 < row["relative difference"] < 1 / 16 for row in quantized[:2])
    # Times at these sizes mean nothing and decide no target; 50 steps of stock diffusers are extrapolated from two.
    guided, alone, light, stock = reports["pipeline"]["runs"]
    assert all(
        found["met"] is None
        for name in ("steps", "pipeline", "fast_pipeline", "stages")
        for found in reports[name]["bars"]
    )
    fast = reports["fast_pipeline"]["runs"]
    assert "fastwan-3" in fast[2]["video"] and fast[2]["denoise"] < fast[0]["denoise"]
    assert all(run["seconds"] >= run["denoise"] + run["decode"] for run in (guided, alone, stock))
    assert all(run["decode"] > 0 for run in (guided, alone, stock, light)) and len(reports["decode"]["runs"]) == 8
    assert light["seconds"] - light["decode"] == pytest.approx(guided["seconds"] - guided["decode"])
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["gpu_run", "--only", "nothing"])
        gpu_run.main()


def test_whole_videos_are_those_of_the_other_steps_and_the_first_stages(tmp_path):
    from gpu_stages import whole_videos

    timed = {"15 steps, guided": 30.0, "15 steps, one forward each": 18.0, "stock, 50 steps, worked out": 120.0}
    runs = [{"video": name, "seconds": seconds} for name, seconds in timed.items()]
    (tmp_path / "pipeline.json").write_text(json.dumps({"runs": runs}))
    runs = [{"video": "15 steps, guided", "seconds": 26.0, "of stock's 50 steps": 0.2}]
    (tmp_path / "fast_pipeline.json").write_text(json.dumps({"runs": runs}))
    bars = whole_videos(SimpleNamespace(output=tmp_path, on_gpu=True, window=3), 6.0)
    assert [found["value"] for found in bars] == [pytest.approx(36 / 120), pytest.approx(32 / 130), None, None]


@pytest.mark.slow
def test_the_shapes_lora_trains_from_nothing(tmp_path):
    """As in the run on a GPU; the LoRA is trained with appended anchors."""
    import gpu_run

    from diffusers_fvg import AnchorLora

    run = gpu_run.Run("tiny", "cpu", tmp_path, 600)
    gpu_run.shapes_lora(run)
    (row,) = json.loads((tmp_path / "shapes_lora.json").read_text(encoding="utf-8"))["runs"]
    assert row["steps"] == 2 and 0 < row["loss of the last tenth"] < 10
    lora = AnchorLora.from_pretrained(tmp_path / "shapes_lora")
    assert lora.form == "appended" and all(tensor.isfinite().all() for tensor in lora.state_dict.values())
