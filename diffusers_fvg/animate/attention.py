"""`set_attention_backend("auto")`: chooses a backend of diffusers' attention dispatcher for a model on its device.

The compute capability says what a device supports, but not whether an installed package works: SageAttention returned noise
on some Hopper GPUs (huggingface/diffusers#12783). So a backend is used only after its results agree with float64 arithmetic on
a small input in this process. A warning names each backend that does not agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.utils import logging
from torch.nn.attention import SDPBackend


logger = logging.get_logger(__name__)

NATIVE = "native"
# Limits of the relative RMS error. Exact backends round like the native one, in another order. SageAttention's 8-bit products
# keep a cosine similarity of at least 0.999 (arXiv 2411.10958, table 9), which is an error of up to 0.045.
_EXACT_FACTOR, _SAGE_ERROR = 3.0, 0.05
# Query and key lengths of the check, for self-attention and cross-attention; they are not multiples of a block.
_LENGTHS = ((333, 333), (333, 77))


def installed_backends() -> frozenset[str]:
    """Returns the backends of [`rank_backends`] whose packages can be imported. `kernels` from the Hub are left out, as
    choosing one would download code."""
    found = {
        "_flash_3": attention_dispatch._CAN_USE_FLASH_ATTN_3,
        "flash": attention_dispatch._CAN_USE_FLASH_ATTN,
        "sage": attention_dispatch._CAN_USE_SAGE_ATTN,
        "_native_cudnn": torch.backends.cudnn.is_available(),
    }
    return frozenset(name for name, usable in found.items() if usable)


def rank_backends(
    capability: tuple[int, int] | None,
    head_dim: int,
    dtype: torch.dtype,
    training: bool,
    installed: Collection[str],
    torch_takes_cudnn: bool = False,
) -> tuple[str, ...]:
    """Returns the backends that support these inputs, fastest first; the last is always diffusers' native one.

    * FlashAttention-3: on Hopper.
    * cuDNN: on Hopper and data-centre Blackwell. If torch's native attention chooses cuDNN itself, the native backend is used
      instead: diffusers' cuDNN backend copies the tensors to another layout first, which is 8 % of a step of Wan2.2-5B on an
      H200.
    * SageAttention: on consumer GPUs, where 8-bit products are twice as fast. It is not exact and has no backward pass.
    * FlashAttention-2: from Ampere on.

    FlexAttention is not faster than these without a mask; window attention uses it without this choice. The order does not
    depend on the length of the video: for a short one, attention takes little time.

    Args:
        capability (`tuple[int, int]`, *optional*): compute capability of an NVIDIA GPU, `None` for any other device.
        head_dim (`int`): channels of a head.
        dtype (`torch.dtype`): dtype of query, key and value.
        training (`bool`): whether gradients are needed. FlashAttention-3 has none in diffusers, SageAttention none at all.
        installed (`Collection[str]`): names to choose from.
        torch_takes_cudnn (`bool`): whether torch's native attention chooses cuDNN.
    """
    if capability is None or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8:
        return (NATIVE,)
    fits = {
        "_flash_3": capability[0] == 9 and head_dim <= 256 and not training,
        "_native_cudnn": capability[0] in (9, 10) and head_dim <= 128,
        "sage": capability in ((8, 6), (8, 9), (12, 0)) and head_dim in (64, 128) and not training,
        "flash": capability[0] >= 8 and head_dim <= 256,
    }
    ranked = [name for name, fit in fits.items() if fit and name in installed]
    if torch_takes_cudnn and "_native_cudnn" in ranked:
        ranked = ranked[: ranked.index("_native_cudnn")]
    return (*ranked, NATIVE)


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    training: bool = False,
    context_parallel: bool = False,
    ranked: Sequence[str] | None = None,
) -> str:
    """Returns the first backend of `ranked` that passes its check on `device`. Each is checked once per process.

    Args:
        device (`torch.device`): device that the model runs on.
        dtype (`torch.dtype`): dtype of the tokens.
        head_dim (`int`): channels of a head.
        training (`bool`): whether gradients are needed; they are then checked, too.
        context_parallel (`bool`): whether to choose only among backends that support context parallelism in diffusers.
        ranked (`Sequence[str]`, *optional*): names to try before the native one; from [`rank_backends`] when left out.
    """
    if ranked is None:
        is_nvidia = device.type == "cuda" and torch.version.hip is None
        capability = torch.cuda.get_device_capability(device) if is_nvidia else None
        installed = installed_backends()
        if context_parallel:
            installed &= attention_dispatch._AttentionBackendRegistry._supports_context_parallel
        takes_cudnn = is_nvidia and _torch_takes_cudnn(device, dtype, head_dim)
        ranked = rank_backends(capability, head_dim, dtype, training, installed, takes_cudnn)
    for name in ranked:
        problem = None if name == NATIVE else backend_problem(name, device, dtype, head_dim, training)
        if problem is None:
            return name
        logger.warning(f"Attention backend {name!r} is not used on {device} with {dtype}: {problem}.")
    return NATIVE


def backend_report(device: torch.device) -> str:
    """Returns the default backend, and which one `"auto"` selects for a bfloat16 model with heads of 128 channels, and why."""
    dtype, head_dim = torch.bfloat16, 128
    chosen = choose_backend(device, dtype, head_dim)
    if chosen != NATIVE:
        why = "it comes first among those that are installed and agree with plain attention"
    elif device.type != "cuda" or torch.version.hip is not None:
        why = "the others are for NVIDIA GPUs"
    elif _torch_takes_cudnn(device, dtype, head_dim):
        why = "torch itself uses cuDNN there"
    else:
        why = "no faster one is installed and agrees with plain attention"
    return f'{NATIVE}, diffusers\' default; set_attention_backend("auto") selects {chosen}, because {why}'


@functools.cache
def _torch_takes_cudnn(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Returns whether `scaled_dot_product_attention` chooses cuDNN itself, which depends on the version of torch."""
    query = torch.zeros(1, 2, _LENGTHS[0][0], head_dim, device=device, dtype=dtype)
    return torch._fused_sdp_choice(query, query, query) == SDPBackend.CUDNN_ATTENTION.value


@functools.cache
def backend_problem(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str | None:
    """Returns what is wrong with a backend, or `None` if its outputs (and gradients in training) pass on random input."""
    for lengths in _LENGTHS:
        generator = torch.Generator().manual_seed(0)
        inputs = [
            torch.randn(1, length, 2, head_dim, generator=generator).to(device, dtype)
            for length in (lengths[0], lengths[1], lengths[1])
        ]
        grad = torch.randn(inputs[0].shape, generator=generator).to(device, dtype)
        try:
            exact = _results(_attention, [x.double().cpu() for x in inputs], grad.double().cpu(), training)
            native, own = (
                _errors(_results(_through_dispatcher(n), inputs, grad, training), exact) for n in (NATIVE, name)
            )
        except Exception as error:  # Packages raise any class of error for an unsupported device or build.
            return f"it fails with {type(error).__name__}: {error}"
        for found, reached in zip(own, native, strict=True):
            limit = _SAGE_ERROR if name == "sage" else _EXACT_FACTOR * reached
            if not found <= limit:
                return f"its relative RMS error is {found:.1e}, and the native backend's is {reached:.1e}"
    return None


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes softmax attention in plain operations, on tensors `(B, L, heads, head_dim)`."""
    scores = torch.einsum("bqnh,bknh->bnqk", query, key) * query.shape[3] ** -0.5
    return torch.einsum("bnqk,bknh->bqnh", scores.softmax(dim=-1), value)


def _through_dispatcher(name: str) -> Callable[..., torch.Tensor]:
    return functools.partial(dispatch_attention_fn, backend=AttentionBackendName(name))


def _results(
    attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor, training: bool
) -> list[torch.Tensor]:
    with torch.set_grad_enabled(training):
        inputs = [x.detach().requires_grad_(training) for x in inputs]
        out = attention(*inputs)
        return [out, *(torch.autograd.grad(out, inputs, grad) if training else ())]


def _errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [
        ((x.double().cpu() - e).square().mean() / e.square().mean()).sqrt().item()
        for x, e in zip(found, exact, strict=True)
    ]
