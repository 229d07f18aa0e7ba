"""The interpreter runs kernels that a compiler would refuse, so they also go through Triton's compiler, without a GPU."""

import re
import subprocess
from pathlib import Path

import pytest
import torch


# With older versions of Triton the gradients of attention spill more: 8 bytes with 3.4 and 3.6, 16 with 3.7 (compute capability 9.0).
triton = pytest.importorskip("triton", minversion="3.9", reason="the limits are those of Triton 3.9")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from diffusers_fvg.kernels import triton_attention, triton_modulation, triton_norm, triton_rope  # noqa: E402


pytestmark = pytest.mark.skipif(triton_modulation.INTERPRETED, reason="this process runs Triton's interpreter")

FLOAT32_POINTERS = ("scale", "shift", "gate", "mean", "rstd", "cos", "sin", "lse", "delta")
INTEGER_POINTERS = {"index_ptr": "*i64", "count_ptr": "*i32", "frames_ptr": "*i32", "runs_ptr": "*i32"}
# Frames of 880 tokens, the width of Wan2.2-5B.
RUN, DIM, HEAD_DIM = 880, 3072, 128


def row_kernels(indexed):
    module = triton_modulation
    block_d, elementwise = triton.next_power_of_2(DIM), module._elementwise_block_d(DIM)
    flags = {"HAS_INDEX": indexed}
    yield module._layer_norm_fwd_kernel, {**flags, **module._forward_tile(RUN, block_d)}
    yield module._gated_residual_fwd_kernel, {**flags, **module._forward_tile(RUN, elementwise)}
    flags["ROW_GRADS"] = True
    yield module._layer_norm_bwd_kernel, {**flags, **module._backward_tile(RUN, block_d)}
    yield module._gated_residual_bwd_kernel, {**flags, **module._backward_tile(RUN, elementwise)}


def rope_kernels(head_dim):
    block = triton_rope._block(DIM, head_dim)
    yield triton_rope._rms_norm_rope_fwd_kernel, block
    yield triton_rope._rms_norm_rope_bwd_kernel, {**block, "WEIGHT_GRAD": True, "TOKENS": triton_rope._TOKENS_PER_SUM}


def norm_kernels(channels):
    # Next to each other in memory or a plane apart.
    for stride in ("x_p", "x_c"):
        yield triton_norm._rms_norm_silu_kernel, {stride: 1, **triton_norm._tile(channels)}


def attention_kernels(head_dim):
    module = triton_attention
    for kernel, owner, blocks in (
        (module._fwd_kernel, "query", module._FORWARD_BLOCKS),
        (module._bwd_query_kernel, "query", module._QUERY_BLOCKS),
        (module._bwd_key_value_kernel, "key", module._KEY_VALUE_BLOCKS),
    ):
        yield kernel, module._tile(RUN, head_dim, torch.bfloat16, owner, blocks)


def source(kernel, constants):
    """The kernel with the types it has in a bfloat16 model, channels next to each other in memory, and addresses and strides
    that 16 divides, which Triton sees at a launch."""
    constants = {**constants, **{name: 1 for name in kernel.arg_names if name.endswith(("_d", "_h"))}}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGER_POINTERS:
            signature[name] = INTEGER_POINTERS[name]
        elif name.endswith("_ptr"):
            is_wide = name.removesuffix("_ptr").endswith(FLOAT32_POINTERS)
            signature[name] = "*fp32" if is_wide else "*bf16"
        else:
            signature[name] = "fp32" if name in ("eps", "scale", "root") else "i32"
    ends = ("_ptr", "_b", "_l", "_n", "_r", "_c", "_p")
    aligned = [name for name in signature if (name.endswith(ends) or name in ("C", "P")) and name not in constants]
    return ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


# Of each compute capability, bytes of shared memory that a block may take (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"), and bytes of registers that a thread may spill. 8.6 has less of both than 8.0.
LIMITS = {86: (99 * 1024, 112), 90: (227 * 1024, 0)}
# Registers of a multiprocessor (same source). These kernels wait for memory, so that a second block must fit beside the first.
REGISTERS = 64 * 1024
IN_PAIRS = (
    triton_modulation._layer_norm_fwd_kernel,
    triton_modulation._gated_residual_fwd_kernel,
    triton_rope._rms_norm_rope_fwd_kernel,
    triton_norm._rms_norm_silu_kernel,
)


def used(cubin: bytes, path: Path) -> tuple[int, int]:
    """Returns the registers of a thread, and the bytes that it keeps in local memory: registers that were spilled."""
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    return max(int(registers) for registers, _ in found), max(int(stack) for _, stack in found)


# Kernels that come near the limits are compiled for both capabilities, and variants far below them for one or none; the slow
# tests compile the rest. Wan's decoders have 1024 channels at most and 96 at least.
CASES = [
    pytest.param(kernels, variant, capability, marks=[] if capability in quick else pytest.mark.slow)
    for kernels, variant, quick in (
        (row_kernels, True, {86}),
        (row_kernels, False, {90}),
        (rope_kernels, HEAD_DIM, {86, 90}),
        (norm_kernels, 1024, {86}),
        (norm_kernels, 96, {90}),
        (attention_kernels, HEAD_DIM, {86, 90}),
        (attention_kernels, 64, set()),
    )
    for capability in LIMITS
]


@pytest.mark.parametrize("kernels, variant, capability", CASES)
def test_fits(kernels, variant, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, options in kernels(variant):
        launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
        constants = {name: value for name, value in options.items() if name not in launch}
        target = GPUTarget("cuda", capability, warp_size=32)
        compiled = triton.compile(source(kernel, constants), target, launch)
        assert compiled.metadata.num_warps == options["num_warps"]
        name = f"{kernel.fn.__name__} {options}"
        shared_memory, most_spilled = LIMITS[capability]
        registers, spilled = used(compiled.asm["cubin"], tmp_path / "kernel.cubin")
        assert compiled.metadata.shared <= shared_memory, name
        assert spilled <= most_spilled, name
        # With an index each token of a tile has its own row, whose addresses take registers.
        if kernel in IN_PAIRS and not options.get("HAS_INDEX"):
            assert 2 * registers * 32 * options["num_warps"] <= REGISTERS, name
