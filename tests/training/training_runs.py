"""A tiny model on disk, a folder of tiny videos, and runs in processes of their own."""

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, WanPipeline
from forked import start_processes
from tiny import tiny_transformer, tiny_wan_components
from tiny_cogvideox import tiny_cogvideox_components

from diffusers_fvg import AnchorLora
from diffusers_fvg.media import write_video
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_1_5_SCHEDULE
from diffusers_fvg.training.config import WAN_TARGETS, TrainConfig


SCALE = 2.5  # of the guidance that is distilled
CAPTIONS = ["a red circle moves right", "a blue square moves left", "a green star grows slowly"]
OPTIONS = {
    "buckets": [[9, 32, 32]],
    "frame_rate": 8.0,
    "max_sequence_length": 16,
    "rank": 4,
    "alpha": 8.0,
    "steps": 7,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "ema_decay": 0.9,
    "mixed_precision": "no",
    "checkpoint_every": 3,
    "seed": 5,
}


def save_cogvideox_model(folder: Path) -> Path:
    scheduler = CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE)
    CogVideoXPipeline(**tiny_cogvideox_components(), scheduler=scheduler).save_pretrained(folder)
    return folder


def save_model(folder: Path, experts: int = 1) -> Path:
    second = {"transformer_2": tiny_transformer(seed=1), "boundary_ratio": 0.875} if experts == 2 else {}
    WanPipeline(**tiny_wan_components(), **second).save_pretrained(folder)
    return folder


def moving_square(seed: int, num_frames: int = 9, height: int = 32, width: int = 32) -> np.ndarray:
    """`(F, H, W, 3)` uint8: a coloured square that moves to the right."""
    frames = np.full((num_frames, height, width, 3), 40, np.uint8)
    colour = np.random.default_rng(seed).integers(80, 255, 3)
    for index, frame in enumerate(frames):
        frame[8:16, 2 * index : 2 * index + 8] = colour
    return frames


def save_videos(folder: Path, num_videos: int = 3, **size) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_videos):
        write_video(folder / f"{index}.mp4", moving_square(index, **size), 8)
        rows.append(json.dumps({"file_name": f"{index}.mp4", "text": CAPTIONS[index % len(CAPTIONS)]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def tiny_config(model: Path, data: Path, output: Path, **options) -> TrainConfig:
    places = {"model": str(model), "data": str(data), "output_dir": str(output)}
    return TrainConfig(**places | {"cache_dir": str(data / "cache")} | OPTIONS | options)


def save_lora(folder: Path, experts: dict, targets=WAN_TARGETS, rank: int = 2, metadata: dict | None = None) -> str:
    """A LoRA of random weights in the layers `targets` of each transformer."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for expert, transformer in experts.items():
        for name, layer in transformer.named_modules():
            if isinstance(layer, torch.nn.Linear) and name.endswith(tuple(targets)):
                for part, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                    state[f"{expert}.{name}.lora_{part}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    AnchorLora(state, metadata).save_pretrained(folder)
    return str(folder)


def distilled_config(places: tuple[Path, Path], output: Path, teacher_lora: str, **options) -> TrainConfig:
    options = {"distill_guidance": [SCALE], "teacher_lora": teacher_lora, "prompt_dropout": 0.0} | options
    return tiny_config(*places, output, **options)


def save_config(config: TrainConfig, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_toml(), encoding="utf-8")
    return path


def losses(output: Path, expert: str = "transformer") -> list[tuple[int, float]]:
    lines = (output / f"log_{expert}.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


# -- processes --------------------------------------------------------------------------------------------------------


def shard_on_cpu() -> None:
    """Lets the trainer shard as `accelerate launch` with `fsdp_version: 2` does: accelerate itself does so on accelerators
    only, by the same two attributes."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin

    from diffusers_fvg.training import processes

    def accelerator(**options):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
        )
        made = Accelerator(**options)
        made.state.distributed_type, made.state.fsdp_plugin = DistributedType.FSDP, plugin
        return made

    Accelerator, processes.Accelerator = processes.Accelerator, accelerator


def _worker(
    config_path: str, rank: int, num_processes: int, port: int, seconds_per_step: float, sharded: bool
) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if num_processes > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from diffusers_fvg.training import loop, trainer

    if sharded:
        shard_on_cpu()
    step = loop.Run._optimizer_step

    def slow_step(self, batches):
        time.sleep(seconds_per_step)
        return step(self, batches)

    loop.Run._optimizer_step = slow_step
    trainer.main_train(config_path)


def start(config_path: Path, num_processes: int = 1, seconds_per_step: float = 0.0, sharded: bool = False) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (num_processes, port, seconds_per_step, sharded)
    return start_processes(_worker, [(str(config_path), rank, *options) for rank in range(num_processes)])


def kill_after(processes: list, output: Path, step: int) -> None:
    """Kills the run with SIGKILL as soon as its log shows a step."""
    deadline = time.monotonic() + 240
    log = output / "log_transformer.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.02)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
