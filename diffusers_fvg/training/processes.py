"""Sets up the processes of a run, and handles tensors that are sharded over them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import TrainConfig


SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)

# Options that FSDP does not support, and the values that switch them off.
UNSHARDED = {"quantize": "none", "block_offload": False, "optimizer": "adamw"}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Creates the accelerator of this process, as the launcher's environment configures it.

    Raises:
        `ValueError`: `accelerate` is configured for DeepSpeed, FSDP1 or FSDP's own activation checkpointing, or for FSDP
            together with an option in `UNSHARDED`.
    """
    tracker = {} if config.tracker == "none" else {"log_with": config.tracker, "project_dir": config.output_dir}
    # The other processes wait during a validation, which takes longer than NCCL's default timeout of ten minutes.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_group_timeout))
    accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[group], **tracker)
    kind = accelerator.distributed_type
    if kind not in SUPPORTED:
        raise ValueError(
            f"`accelerate` is set up for {kind.value}; use MULTI_GPU, or FSDP with `fsdp_version: 2` if the model does not fit "
            "one device. The base is frozen, so ZeRO stages 1 and 2 would have almost nothing to shard."
        )
    if kind is DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"`accelerate` is set up for FSDP{plugin.fsdp_version}; set `fsdp_version: 2`.")
        if plugin.activation_checkpointing:
            raise ValueError(
                "`fsdp_activation_checkpointing` renames parameters; set it to false and `gradient_checkpointing = true`."
            )
        for name, without in UNSHARDED.items():
            if (value := getattr(config, name, without)) != without:
                raise ValueError(
                    f"`{name}={value!r}`, but FSDP does not support it; set it to {without!r}, or run on one device."
                )
        # Weights keep their dtypes: bfloat16 for the base, float32 for the LoRA. Accelerate's default policy would cast the
        # forward's inputs, and so round the times to the 8 significant bits of bfloat16.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        # The launcher enables this by default. It only helps models of transformers, and fails (accelerate 1.15) if the
        # outermost module has a parameter, as here.
        plugin.cpu_ram_efficient_loading = False
    return accelerator


def on_main_process(accelerator: Accelerator, call: Callable[[], Any]) -> Any:
    """Calls `call` on the main process and returns its result, which must be small and picklable, on all processes.

    Raises:
        `ValueError`, `OSError`, `FloatingPointError`: if `call` raises one, on all processes. Other errors become a
            `RuntimeError` on the other processes.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = call()
        except Exception as error:
            plain = next(
                (kind for kind in (FloatingPointError, OSError, ValueError) if isinstance(error, kind)), RuntimeError
            )
            outcome[1] = plain(str(error))
            if accelerator.num_processes > 1:
                broadcast_object_list(outcome)
            raise
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a sharded tensor on each process. Any other tensor is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process's shard, without a copy. Any other tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Moves a tensor that is equal on all processes to the device and the sharding of `like`."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    # Each process takes its shard from its own copy, without communication.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
