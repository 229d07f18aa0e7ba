import hashlib
import importlib.util
import json

import pytest
import torch

from diffusers_fvg import kernels
from diffusers_fvg.kernels import dispatch, reference


TOKENS, GATE = torch.ones(1, 4, 6), torch.ones(1, 2, 6)


@pytest.fixture
def reference_calls(monkeypatch):
    calls = []
    definition = reference.gated_residual
    monkeypatch.setattr(reference, "gated_residual", lambda *args: calls.append(args) or definition(*args))
    return calls


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_a_cpu_takes_the_definition(choice, reference_calls):
    with kernels.use_kernels(choice):
        kernels.gated_residual(TOKENS, TOKENS, GATE)
    assert len(reference_calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("choice", "dtype", "calls"), [
    ("auto", torch.bfloat16, 0), ("auto", torch.float64, 1), ("reference", torch.bfloat16, 1), ("triton", torch.bfloat16, 0),
])  # fmt: skip
def test_a_gpu_takes_triton_where_it_was_tested(choice, dtype, calls, reference_calls):
    tokens, gate = TOKENS.to("cuda", dtype), GATE.to("cuda", dtype)
    with kernels.use_kernels(choice):
        assert (kernels.gated_residual(tokens, tokens, gate) == 2).all()
    assert len(reference_calls) == calls


def test_auto_takes_the_kernels_where_their_tests_passed(monkeypatch, tmp_path):
    """A stand-in for GPUs: what is asked of torch about them."""
    probe = dispatch._tested_probe.__wrapped__
    cuda = torch.device("cuda", 0)
    sources = {"triton_rope": dispatch.source_digest("triton_rope"), "triton_norm": "0" * 16}
    table = {"9.0": {"sources": sources, "tested_on": "a GPU"}}
    monkeypatch.setattr(dispatch, "TESTED_GPUS", tmp_path / "tested_gpus.json")
    dispatch.TESTED_GPUS.write_text(json.dumps(table))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert probe(cuda, "triton_rope") is None
    assert "they have changed since their tests ran on compute capability 9.0" in probe(cuda, "triton_norm")
    assert "their tests have not run on compute capability 9.0" in probe(cuda, "triton_attention")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "have not run on compute capability 8.6 (FVG_KERNELS=triton" in probe(cuda, "triton_rope")
    assert "NVIDIA" in probe(torch.device("cpu"), "triton_rope")
    # What `fvg doctor` tells: the kernels are there but for some.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_device_problem", lambda device: None)
    monkeypatch.setattr(dispatch, "_tested_probe", probe)
    with kernels.use_kernels("auto"):
        text = dispatch.kernel_report(cuda)
    assert text.startswith("Triton (FVG_KERNELS=auto), tested on a GPU, without triton_attention: ")
    assert "triton_rope" not in text


KERNEL = '''"""Sums."""
@jit
def kernel(x, N=None):
    """Returns the sum."""
    return x + N * 2.0  # of one row
'''


@pytest.mark.parametrize(
    ("before", "after", "is_same"),
    [
        ("Sums.", "Adds up.", True),
        ('''    """Returns the sum."""\n''', "", True),
        ("  # of one row", "", True),
        ("x + N * 2.0", "(\n        x + N * 2.0\n    )", True),
        ("+", "-", False),
        ("2.0", "2.5", False),
        ("2.0", "2", False),
        ("None", "0", False),
        ("@jit\n", "", False),
        ("x + N", "N + x", False),
    ],
)
def test_the_digest_of_a_kernel_is_that_of_its_code(before, after, is_same):
    assert before in KERNEL
    digests = [dispatch.code_digest(text) for text in (KERNEL, KERNEL.replace(before, after))]
    assert (digests[0] == digests[1]) == is_same


def test_the_digest_is_the_same_in_every_version_of_python():
    """The digest is that of the tree in Python's grammar, without the fields that newer versions add."""
    arguments = "args=arguments(args=[arg(arg='x'), arg(arg='N')], defaults=[Constant()])"
    product = "BinOp(left=Name(id='N', ctx=Load()), op=Mult(), right=Constant(value=2.0))"
    body = f"body=[Return(value=BinOp(left=Name(id='x', ctx=Load()), op=Add(), right={product}))]"
    decorators = "decorator_list=[Name(id='jit', ctx=Load())]"
    tree = f"Module(body=[FunctionDef(name='kernel', {arguments}, {body}, {decorators})])"
    assert dispatch.code_digest(KERNEL) == hashlib.sha256(tree.encode()).hexdigest()[:16]


def test_triton_on_a_cpu_says_why_not():
    pytest.importorskip("triton")
    with kernels.use_kernels("triton"), pytest.raises(ValueError, match="the tensors are on cpu.*FVG_KERNELS=auto"):
        kernels.gated_residual(TOKENS, TOKENS, GATE)


def test_without_the_package_triton(monkeypatch, reference_calls):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dispatch, "_probe", dispatch._probe.__wrapped__)
    with kernels.use_kernels("triton"), pytest.raises(ValueError, match="the package triton is not installed"):
        kernels.gated_residual(TOKENS, TOKENS, GATE)
    kernels.gated_residual(TOKENS, TOKENS, GATE)
    assert len(reference_calls) == 1


def test_use_kernels_ends_with_its_block():
    before = dispatch._kernels
    with pytest.raises(RuntimeError), kernels.use_kernels("triton"), kernels.use_kernels("reference"):
        raise RuntimeError
    assert dispatch._kernels == before
    with (
        pytest.raises(ValueError, match="kernels is 'cuda'; set one of auto, reference, triton"),
        kernels.use_kernels("cuda"),
    ):
        pass


def test_environment_variable(run_python):
    code = """
        import torch
        try:
            from diffusers_fvg import kernels
            kernels.gated_residual(torch.ones(1, 4, 6), torch.ones(1, 4, 6), torch.ones(1, 2, 6))
        except ValueError as error:
            print(error)
    """
    assert run_python(code, FVG_KERNELS="triton").startswith("Triton kernels are requested, but ")
    assert "FVG_KERNELS is 'fast'; set one of auto, reference, triton" in run_python(code, FVG_KERNELS="fast")


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"residual has shape \(1, 4, 5\); pass \(1, 4, 6\)"):
        kernels.gated_residual(TOKENS, TOKENS[..., :5], GATE)
    with pytest.raises(ValueError, match=r"different numbers of rows, {'scale': 2, 'shift': 1}"):
        kernels.modulated_layer_norm(TOKENS, GATE, GATE[:, :1], 1e-6)
