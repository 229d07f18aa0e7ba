"""The fused operations that models call: each checks the shapes and chooses the implementation.

The environment variable `FVG_KERNELS`, read when the package is first used, or [`use_kernels`] sets the choice:

* `auto`, the default: Triton for the dtypes and widths that the tests cover, on NVIDIA GPUs whose compute capability
  `tested_gpus.json` lists; plain torch everywhere else. `examples/benchmarks/gpu_run.py` adds a capability when the tests
  marked `gpu` pass on it, with the digests of the tested kernel files. Kernels of a file whose code has changed since then,
  or is new, run in plain torch, too.
* `reference`: always the definition in plain torch.
* `triton`: always Triton; raises an error that names the reason if Triton cannot run.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import attention, reference


# Files with Triton kernels.
SOURCES = ("triton_attention", "triton_modulation", "triton_norm", "triton_rope")
TESTED_GPUS = Path(__file__).parent / "tested_gpus.json"
_CHOICES = ("auto", "reference", "triton")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A Triton program holds a whole token in registers. Wan models have 1536, 3072 or 5120 channels.
_MAX_DIM = 8192
# Query, key and value blocks of a wider head do not fit into shared memory together.
_MAX_HEAD_DIM = 128


def _check_choice(kernels: str, source: str) -> str:
    if kernels not in _CHOICES:
        raise ValueError(f"{source} is {kernels!r}; set one of {', '.join(_CHOICES)}.")
    return kernels


_kernels = _check_choice(os.environ.get("FVG_KERNELS", "auto"), "The environment variable FVG_KERNELS")


@contextlib.contextmanager
def use_kernels(kernels: str) -> Iterator[None]:
    """Chooses the implementation inside a `with` block, for the whole process.

    Args:
        kernels (`str`): `"auto"`, `"reference"` or `"triton"`, as in the environment variable `FVG_KERNELS`.

    Raises:
        `ValueError`: `kernels` is another name.
    """
    global _kernels
    before, _kernels = _kernels, _check_choice(kernels, "kernels")
    try:
        yield
    finally:
        _kernels = before


def modulated_layer_norm(
    hidden_states: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies LayerNorm without weights, then scale and shift by rows; see [`reference.modulated_layer_norm`].

    Raises:
        `ValueError`: the rows do not fit the tokens.
    """
    _check_rows(hidden_states, row_index, scale=scale, shift=shift)
    if _takes_triton("triton_modulation", hidden_states, scale, shift):
        from . import triton_modulation

        return triton_modulation.modulated_layer_norm(hidden_states, scale, shift, eps, row_index)
    return reference.modulated_layer_norm(hidden_states, scale, shift, eps, row_index)


def layer_norm(hidden_states: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """Computes `norm(hidden_states)` in float32; with Triton in one pass, by the kernel of the modulated norm.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, D)`): tokens.
        norm (`torch.nn.LayerNorm`): norm over the last dimension with a weight and a bias (Wan's `norm2`).

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.
    """
    if not _takes_triton("triton_modulation", hidden_states, norm.weight, norm.bias):
        return norm(hidden_states)
    from . import triton_modulation

    # One row serves all tokens: `1 + scale` is the weight.
    scale, shift = (row.expand(hidden_states.shape[0], 1, -1) for row in (norm.weight.float() - 1, norm.bias.float()))
    return triton_modulation.modulated_layer_norm(hidden_states, scale, shift, norm.eps, None)


def gated_residual(
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds a residual branch multiplied by rows of a gate; see [`reference.gated_residual`].

    Raises:
        `ValueError`: the rows or the residual do not fit the tokens.
    """
    _check_rows(hidden_states, row_index, gate=gate)
    if residual.shape != hidden_states.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; pass {tuple(hidden_states.shape)}.")
    if _takes_triton("triton_modulation", hidden_states, residual, gate):
        from . import triton_modulation

        return triton_modulation.gated_residual(hidden_states, residual, gate, row_index)
    return reference.gated_residual(hidden_states, residual, gate, row_index)


def rms_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies RMS norm over all heads, then rotary embedding, to query and key; see [`reference.rms_norm_rope`].

    Raises:
        `ValueError`: key, weights or angles do not fit the query, or an angle requires a gradient.
    """
    batch_size, num_tokens, dim = query.shape
    if key.shape != query.shape:
        raise ValueError(f"key has shape {tuple(key.shape)}; pass that of query, {tuple(query.shape)}.")
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight.shape != (dim,):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; pass ({dim},).")
    head_dim = cos.shape[-1]
    for name, angles in (("cos", cos), ("sin", sin)):
        shapes = [(count, num_tokens, 1, head_dim) for count in (1, batch_size)]
        if tuple(angles.shape) not in shapes or head_dim % 2 or dim % head_dim:
            raise ValueError(
                f"{name} has shape {tuple(angles.shape)}; pass (1, {num_tokens}, 1, head_dim), or {batch_size} of these for a "
                f"batch, with an even head_dim that divides {dim}."
            )
        if angles.requires_grad:
            raise ValueError(f"{name} requires a gradient; the angles are constants here: pass {name}.detach().")
    if _takes_triton("triton_rope", query, key, query_weight, key_weight, cos, sin):
        from . import triton_rope

        return triton_rope.rms_norm_rope(query, key, query_weight, key_weight, cos, sin, eps)
    return reference.rms_norm_rope(query, key, query_weight, key_weight, cos, sin, eps)


def rms_norm_silu(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Applies RMS norm over the channels, then SiLU; see [`reference.rms_norm_silu`]. The Triton kernel has no gradient.

    Raises:
        `ValueError`: the weight does not fit the channels.
    """
    channels = hidden_states.shape[1]
    if weight.shape != (channels,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass ({channels},).")
    # The check of the width reads the last dimension, so channels are moved there.
    if not torch.is_grad_enabled() and _takes_triton("triton_norm", hidden_states.movedim(1, -1), weight):
        from . import triton_norm

        return triton_norm.rms_norm_silu(hidden_states, weight)
    return reference.rms_norm_silu(hidden_states, weight)


def fuses_norm(hidden_states: torch.Tensor) -> bool:
    """Returns whether [`rms_norm_silu`] runs as one Triton kernel on these features, rather than several of torch."""
    return not torch.is_grad_enabled() and _takes_triton("triton_norm", hidden_states.movedim(1, -1), hidden_states)


def frame_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Computes attention between the pairs of frames in `seen`; see [`attention.frame_attention`].

    Without Triton, groups of frames attend to the keys that they see. torch.compile cannot read `seen` on the CPU, so
    compiled models use FlexAttention on a GPU and the masked definition elsewhere.

    Raises:
        `ValueError`: query, key, value and `seen` do not fit each other.
    """
    batch_size, num_tokens, _, head_dim = query.shape
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"key and value have shapes {tuple(key.shape)} and {tuple(value.shape)}; pass that of query, "
            f"{tuple(query.shape)}."
        )
    frames = seen.shape[-1]
    if seen.shape != (batch_size, frames, frames) or seen.dtype != torch.bool or num_tokens % frames != 0:
        raise ValueError(
            f"seen has shape {tuple(seen.shape)} and dtype {seen.dtype}; pass ({batch_size}, frames, frames) of bool, "
            f"with a number of frames that divides {num_tokens} tokens."
        )
    if _takes_triton("triton_attention", query, key, value, max_dim=_MAX_HEAD_DIM):
        from . import triton_attention

        return triton_attention.frame_attention(query, key, value, seen)
    if not torch.compiler.is_compiling():
        return attention.gathered_frame_attention(query, key, value, seen)
    if query.device.type == "cuda":
        return attention.flex_frame_attention(query, key, value, seen)
    return attention.frame_attention(query, key, value, seen)


def kernel_report(device: torch.device) -> str:
    """Returns which implementation runs the package's kernels on a device, and why."""
    problem, without = _device_problem(device), []
    if problem is None and _kernels == "auto":
        problems = {source: _untested(device, source) for source in SOURCES}
        without = [f"{source}: {reason}" for source, reason in problems.items() if reason is not None]
        problem = "; ".join(without) if len(without) == len(SOURCES) else None
    if problem is None and _kernels != "reference":
        why = f", tested on {_tested(device)['tested_on']}" if _kernels == "auto" else ""
        return f"Triton (FVG_KERNELS={_kernels}){why}" + (f", without {'; '.join(without)}" if without else "")
    return f"torch (FVG_KERNELS={_kernels})" + (f"; Triton is not for {device}: {problem}" if problem else "")


def source_digest(source: str) -> str:
    """Returns the [`code_digest`] of a kernel file, which identifies the version that was tested."""
    return code_digest((Path(__file__).parent / f"{source}.py").read_text(encoding="utf-8"))


def code_digest(text: str) -> str:
    """Returns a digest of the code in the text of a Python file.

    It covers all statements with their names, constants and operators. It does not cover comments, docstrings, and how the
    code is laid out in lines, so corrected prose does not switch tested kernels off. All supported versions of Python give
    the same digest.
    """
    return hashlib.sha256(_code(ast.parse(text)).encode()).hexdigest()[:16]


def _code(node: Any) -> str:
    """Writes a syntax tree, or a part of it, without docstrings and empty fields.

    `ast.dump` writes the same tree differently in Python 3.12 and 3.13: newer versions have more fields, and leave out empty
    ones.
    """
    if isinstance(node, list):
        return f"[{', '.join(_code(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({', '.join(f'{name}={_code(value)}' for name, value in fields)})"


def _is_docstring(node: Any) -> bool:
    """Returns whether a node is a statement that is only a string, which does nothing when it runs."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _takes_triton(source: str, *tensors: torch.Tensor, max_dim: int = _MAX_DIM) -> bool:
    """Returns whether this call uses a Triton kernel of the file `source`.

    Raises:
        `ValueError`: `FVG_KERNELS=triton` is set, and Triton cannot run this call.
    """
    if _kernels == "reference" or (_kernels == "auto" and _untested(tensors[0].device, source) is not None):
        return False
    problem = _device_problem(tensors[0].device) or _tensor_problem(tensors, max_dim)
    if problem is not None and _kernels == "triton":
        raise ValueError(
            f"Triton kernels are requested, but {problem}. Set FVG_KERNELS=auto to use them only where they can run."
        )
    return problem is None


@torch.compiler.assume_constant_result
def _device_problem(device: torch.device) -> str | None:
    # torch.compile takes the result as a constant. Without the decorator it would trace into `_probe` despite its cache.
    return _probe(device)


@torch.compiler.assume_constant_result
def _untested(device: torch.device, source: str) -> str | None:
    return _tested_probe(device, source)


@functools.cache
def _tested_probe(device: torch.device, source: str) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "the tests of the Triton kernels pass on NVIDIA GPUs"
    sources = _tested(device).get("sources", {})
    if sources.get(source) != source_digest(source):
        what = "they have changed since their tests ran" if source in sources else "their tests have not run"
        return f"{what} on compute capability {_capability(device)} (FVG_KERNELS=triton uses them anyway)"
    return None


def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def _tested(device: torch.device) -> dict[str, Any]:
    """Returns the entry of a GPU's compute capability in `tested_gpus.json`; an empty one if its tests have not run."""
    return json.loads(TESTED_GPUS.read_text(encoding="utf-8")).get(_capability(device), {})


@functools.cache
def _probe(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from . import triton_modulation

    if triton_modulation.INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}: Triton runs on GPUs, or anywhere in its interpreter (TRITON_INTERPRET=1)"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is not an NVIDIA GPU of compute capability 8.0 or higher"
    return None


def _tensor_problem(tensors: tuple[torch.Tensor, ...], max_dim: int) -> str | None:
    dim = tensors[0].shape[-1]
    if dim > max_dim:
        return f"the tokens have {dim} channels, but the kernels support up to {max_dim}"
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"a tensor is {tensor.dtype}, but the kernels support float32, float16 and bfloat16"
        if tensor.device != tensors[0].device:
            return f"the tensors are on {tensors[0].device} and {tensor.device}"
    return None


def _check_rows(hidden_states: torch.Tensor, row_index: torch.Tensor | None, **tables: torch.Tensor) -> None:
    batch_size, num_tokens, dim = hidden_states.shape
    counts = {name: rows.shape[1] for name, rows in tables.items() if rows.ndim == 3}
    if len(set(counts.values())) > 1:
        raise ValueError(f"The tables have different numbers of rows, {counts}; pass equal ones.")
    for name, rows in tables.items():
        if rows.ndim != 3 or rows.shape[0] != batch_size or rows.shape[2] != dim:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}; pass ({batch_size}, rows, {dim}).")
        if row_index is None and num_tokens % rows.shape[1] != 0:
            raise ValueError(
                f"{name} has {rows.shape[1]} rows, which do not divide {num_tokens} tokens into equal runs; "
                "pass row_index to name the row of each token."
            )
    if row_index is not None and row_index.shape != (num_tokens,):
        raise ValueError(f"row_index has shape {tuple(row_index.shape)}; pass ({num_tokens},), one row per token.")
