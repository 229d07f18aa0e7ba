"""The choice of an attention backend: what ranks where, and that a wrong one is found out and named."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from diffusers_fvg.animate import attention
from diffusers_fvg.animate.attention import backend_problem, backend_report, choose_backend, rank_backends


ALL = ("_flash_3", "_native_cudnn", "sage", "flash")
CPU = torch.device("cpu")


@pytest.mark.parametrize(("capability", "head_dim", "dtype", "training", "expected"), [
    ((9, 0), 128, torch.bfloat16, False, ("_flash_3", "_native_cudnn", "flash", "native")),
    ((9, 0), 128, torch.bfloat16, True, ("_native_cudnn", "flash", "native")),
    ((9, 0), 256, torch.float16, False, ("_flash_3", "flash", "native")),
    ((10, 0), 64, torch.bfloat16, False, ("_native_cudnn", "flash", "native")),
    ((8, 9), 128, torch.bfloat16, False, ("sage", "flash", "native")),
    ((8, 9), 128, torch.bfloat16, True, ("flash", "native")),
    ((12, 0), 96, torch.float16, False, ("flash", "native")),
    ((8, 0), 128, torch.bfloat16, False, ("flash", "native")),
    ((7, 5), 128, torch.float16, False, ("native",)),
    ((9, 0), 128, torch.float32, False, ("native",)),
    ((9, 0), 12, torch.bfloat16, False, ("native",)),
    (None, 128, torch.bfloat16, False, ("native",)),
])  # fmt: skip
def test_rank(capability, head_dim, dtype, training, expected):
    assert rank_backends(capability, head_dim, dtype, training, ALL) == expected
    assert rank_backends(capability, head_dim, dtype, training, ()) == ("native",)


def test_torch_with_cudnn_inside_comes_before_what_copies():
    def ranked(training):
        return rank_backends((9, 0), 128, torch.bfloat16, training, ALL, torch_takes_cudnn=True)

    assert ranked(training=False) == ("_flash_3", "native")
    assert ranked(training=True) == ("native",)
    assert rank_backends((8, 0), 128, torch.bfloat16, False, ALL, torch_takes_cudnn=True) == ("flash", "native")


def test_what_torch_takes_is_asked(monkeypatch):
    asked = attention._torch_takes_cudnn.__wrapped__
    assert not asked(CPU, torch.float32, 64)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value)
    assert asked(CPU, torch.float32, 64)


def plain(query, key, value, **kwargs):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, **kwargs).transpose(1, 2)


def unscaled(query, key, value):
    return plain(query, key, value, scale=1.0)


def shortened(query, key, value):
    """Wrong only where the number of keys is not a multiple of 64."""
    whole = key.shape[1] // 64 * 64
    return plain(query, key[:, :whole], value[:, :whole])


def eight_bit(query, key, value):
    query, key = ((x / x.abs().max() * 127).round() / 127 * x.abs().max() for x in (query, key))
    return plain(query, key, value)


def without_gradient(query, key, value):
    return plain(query, key, value).detach()


def wrong_gradient(query, key, value):
    out = plain(query, key, value)
    return 2 * out - out.detach()


def failing(query, key, value):
    raise RuntimeError("no kernel image is available")


@pytest.fixture
def plant(monkeypatch):
    """Puts a function in a backend's place in diffusers' registry."""
    backend_problem.cache_clear()

    def put(name, function):
        calls = []

        def counted(query, key, value):
            calls.append(query)
            return function(query, key, value)

        member = AttentionBackendName(name)
        monkeypatch.setitem(_AttentionBackendRegistry._backends, member, counted)
        monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, member, {"query", "key", "value"})
        return calls

    yield put
    backend_problem.cache_clear()


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(attention.logger, "warning", found.append)
    return found


@pytest.mark.parametrize(("name", "function", "training", "problem"), [
    ("_flash_3", unscaled, False, "its relative RMS error is [1-9].*e.*, and the native backend's is "),
    ("_flash_3", shortened, False, "its relative RMS error is "),
    ("flash", eight_bit, False, "its relative RMS error is "),
    ("sage", unscaled, False, "its relative RMS error is "),
    ("flash", failing, False, "it fails with RuntimeError: no kernel image"),
    ("flash", without_gradient, True, "it fails with RuntimeError: .*does not require grad"),
    ("flash", wrong_gradient, True, "its relative RMS error is "),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wrong_backend_is_named_and_passed_over(name, function, training, problem, dtype, plant, warnings):
    plant(name, function)
    assert choose_backend(CPU, dtype, 64, training, ranked=(name, "native")) == "native"
    (message,) = warnings
    assert message.startswith(f"Attention backend '{name}' is not used on cpu with {dtype}: ")
    assert re.search(problem, message), message


@pytest.mark.parametrize(("name", "function", "training"), [
    ("_flash_3", plain, False),
    ("flash", plain, True),
    ("flash", without_gradient, False),
    ("sage", eight_bit, False),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_right_backend_is_taken(name, function, training, dtype, plant, warnings):
    plant(name, function)
    assert choose_backend(CPU, dtype, 64, training, ranked=(name, "native")) == name
    assert not warnings


def test_the_second_of_two_and_once_per_process(plant, warnings):
    wrong, right = plant("_flash_3", unscaled), plant("flash", plain)
    for _ in range(2):
        assert choose_backend(CPU, torch.bfloat16, 64, ranked=("_flash_3", "flash", "native")) == "flash"
    assert len(wrong) == 1 and len(right) == 2  # lengths tried, the wrong one failing at the first
    assert len(warnings) == 2


def test_on_a_cpu():
    assert choose_backend(CPU, torch.bfloat16, 128) == "native"
    assert backend_report(CPU).endswith("selects native, because the others are for NVIDIA GPUs")


@pytest.mark.parametrize(
    ("takes_cudnn", "installed", "expected"),
    [
        (True, (), "selects native, because torch itself uses cuDNN there"),
        (False, (), "selects native, because no faster one is installed and agrees with plain attention"),
        (True, ("_flash_3",), "selects _flash_3, because it comes first among those that are installed and agree"),
    ],
)
def test_the_report_gives_the_reason(takes_cudnn, installed, expected, monkeypatch):
    """A stand-in for a GPU: what is asked of torch about it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "installed_backends", lambda: frozenset(installed))
    monkeypatch.setattr(attention, "_torch_takes_cudnn", lambda *_: takes_cudnn)
    monkeypatch.setattr(attention, "backend_problem", lambda *_: None)
    report = backend_report(torch.device("cuda", 0))
    assert report.startswith("native, diffusers' default; ") and expected in report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("training", [False, True])
def test_on_a_gpu(training):
    device = torch.device("cuda", torch.cuda.current_device())
    name = choose_backend(device, torch.bfloat16, 128, training)
    assert name == "native" or backend_problem(name, device, torch.bfloat16, 128, training) is None
