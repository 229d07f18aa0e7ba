"""The processes of a run, and the tensors that they hold shards of."""

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

# Options that FSDP excludes, and their values without them.
UNSHARDED = {"quantize": "none", "block_offload": False, "optimizer": "adamw"}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of this process; its launcher's environment says how many there are and whether they share the model.

    Raises:
        `ValueError`: set up for DeepSpeed, FSDP1 or FSDP's own activation checkpointing, or for FSDP with an option that it
            has no way to shard.
    """
    tracker = {} if config.tracker == "none" else {"log_with": config.tracker, "project_dir": config.output_dir}
    # The default of NCCL, ten minutes, is less than a validation takes, for which the other processes wait.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_group_timeout))
    accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[group], **tracker)
    kind = accelerator.distributed_type
    if kind not in SUPPORTED:
        raise ValueError(
            f"`accelerate` is set up for {kind.value}; use MULTI_GPU, or FSDP with `fsdp_version: 2` where the model does not "
            "fit one device. The base is frozen, so that ZeRO stages 1 and 2 would have next to nothing to shard."
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
                    f"`{name}={value!r}`, but FSDP shards weights and optimizer as they are; set it to {without!r}, or run on one "
                    "device."
                )
        # Weights keep their types: the base's bfloat16, the LoRA's float32. Accelerate's own policy would round the times,
        # which a forward takes as an input, to 8 bits.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        # The launcher's default. Only models of transformers gain by it, and it fails (accelerate 1.15) where, as here, the
        # outermost module has a parameter.
        plugin.cpu_ram_efficient_loading = False
    return accelerator


def on_main_process(accelerator: Accelerator, call: Callable[[], Any]) -> Any:
    """What `call` gives on the main process, on all of them, which wait for it: something small that can be pickled.

    Raises:
        `ValueError`, `OSError`, `FloatingPointError`: on all processes, where `call` raises it. Of another kind it is a
            `RuntimeError` on the others.
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
    """The tensor that the processes hold shards of, on each of them. Any other tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard, sharing its memory. Any other tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Moves a whole tensor, the same on every process, to where and how `like` is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    # From what each process has: nothing is sent.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
