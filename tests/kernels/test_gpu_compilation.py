"""The interpreter runs kernels that a compiler would refuse, so they also go through Triton's compiler, without a GPU."""

import pytest
import torch


triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from diffusers_fvg.kernels import triton_attention, triton_modulation, triton_rope  # noqa: E402


pytestmark = pytest.mark.skipif(triton_modulation.INTERPRETED, reason="this process runs Triton's interpreter")

FLOAT32_POINTERS = ("scale", "shift", "gate", "mean", "rstd", "cos", "sin", "lse", "delta")
INTEGER_POINTERS = {"index_ptr": "*i64", "count_ptr": "*i32", "frames_ptr": "*i32"}
# Frames of 880 tokens, the width of Wan2.2-5B.
RUN, DIM, HEAD_DIM = 880, 3072, 128


def row_kernels():
    module = triton_modulation
    block_d, elementwise = triton.next_power_of_2(DIM), module._elementwise_block_d(DIM)
    for indexed in (False, True):
        flags = {"HAS_INDEX": indexed}
        yield module._layer_norm_fwd_kernel, {**flags, **module._forward_tile(RUN, block_d)}
        yield module._gated_residual_fwd_kernel, {**flags, **module._forward_tile(RUN, elementwise)}
        flags["ROW_GRADS"] = True
        yield module._layer_norm_bwd_kernel, {**flags, **module._backward_tile(RUN, block_d)}
        yield module._gated_residual_bwd_kernel, {**flags, **module._backward_tile(RUN, elementwise)}


def rope_kernels():
    block = triton_rope._block(DIM, HEAD_DIM)
    yield triton_rope._rms_norm_rope_fwd_kernel, block
    yield triton_rope._rms_norm_rope_bwd_kernel, {**block, "WEIGHT_GRAD": True, "TOKENS": triton_rope._TOKENS_PER_SUM}


def attention_kernels():
    module = triton_attention
    for head_dim in (64, HEAD_DIM):
        for kernel, owner, blocks in (
            (module._fwd_kernel, "query", module._FORWARD_BLOCKS),
            (module._bwd_query_kernel, "query", module._QUERY_BLOCKS),
            (module._bwd_key_value_kernel, "key", module._KEY_VALUE_BLOCKS),
        ):
            yield kernel, module._tile(RUN, head_dim, torch.bfloat16, owner, blocks)


def source(kernel, constants):
    """The kernel with the types it has in a bfloat16 model, and channels next to each other in memory."""
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
            signature[name] = "fp32" if name in ("eps", "scale") else "i32"
    return ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernels", [row_kernels, rope_kernels, attention_kernels])
def test_compiles(kernels, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, options in kernels():
        launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
        constants = {name: value for name, value in options.items() if name not in launch}
        target = GPUTarget("cuda", capability, warp_size=32)
        compiled = triton.compile(source(kernel, constants), target, launch)
        assert compiled.asm["cubin"] and compiled.metadata.num_warps == options["num_warps"]
