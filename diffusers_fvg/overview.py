"""Output of `fvg models`, `fvg train --recipe NAME` and `fvg doctor`."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from .recipes import ANIMATOR_RECIPES, RECIPES, STORED, AnimatorRecipe, Recipe


if TYPE_CHECKING:
    from .pipelines.profiles import Stage


# NVIDIA H100 SXM data sheet: bfloat16 without sparsity, operations per second.
H100_PEAK = 989.4e12
GIB = 2**30
NOT_KNOWN = "?"
# Offloading -> which weights are on the GPU at a time.
PLACED = {"none": "all", "model": "stages", "group": "layers"}
NOTES = """\
FIRST FRAME: "kept" means that the base keeps it without training. The others
need an anchor LoRA, and none is published: `fvg train --recipe NAME` prints a
config that trains one.
12GB to 80GB: what a GPU of that size holds at a time (all models, one stage,
or one layer), and the peak in GiB, in bfloat16 at the model's own video size;
"+" means that the VAE decodes in tiles. Computed, not measured. The peaks of
image-to-video pipelines allow 8 GiB for activations.
`fvg plan` computes the same for any video size.
GB: size of the weights on the Hub. If the Hub does not answer, it is the
published size, or "?" if that is not known.
cogvideox-license: the Hub records a change to Apache 2.0; read the licence.
This project has never run a recipe with its real weights."""


def models_text() -> str:
    """Returns the recipes with their memory by profile, then the repositories with licences and sizes; 80 columns."""
    from .pipelines.profiles import CARDS

    lines = [f"{'RECIPE':15}  {'FIRST FRAME':12}" + "".join(f" {name:>11}" for name in CARDS)]
    for recipe in RECIPES.values():
        first = "kept" if recipe.keeps_first_frame else "needs LoRA"
        cells = "".join(f" {cell:>11}" for cell in memory_cells(recipe, CARDS))
        lines.append(f"{recipe.name:15}  {first:12}{cells}")
    lines += ["", "IMAGE-TO-VIDEO PIPELINES (first frame kept; composer and rewriter as above)"]
    for animator in ANIMATOR_RECIPES.values():
        cells = "".join(f" {cell:>11}" for cell in memory_cells(animator, CARDS))
        lines += [
            f"{animator.name:29}{cells}",
            f"  {animator.repositories['animator']}",
            f"  {animator.licenses['animator']}",
        ]
    lines += ["", f"{'REPOSITORY':32}  {'LICENCE':17}  {'GB':>4}  USED BY"]
    sizes = _sizes()
    for repository, (license, user) in _repositories().items():
        lines.append(f"{repository:32}  {license:17}  {sizes[repository]:>4}  {user}")
    return "\n".join([*lines, "", NOTES])


def recipe_stages(recipe: Recipe | AnimatorRecipe) -> list[Stage]:
    """Returns the memory that each part of a recipe needs in bfloat16, computed from published configs."""
    import torch

    from .pipelines.profiles import animator_stages, empty_weights, model_stages, part_stage
    from .recipes.outline import make_animator_models

    parts = _parts(recipe.repositories["composer"], recipe.repositories["rewriter"])
    if isinstance(recipe, AnimatorRecipe):
        with empty_weights(torch.bfloat16):
            models = make_animator_models(recipe)
        return [part_stage(name, part) for name, part in parts.items()] + animator_stages(models)
    return model_stages(recipe.facts, make_parts=lambda: parts)


@cache
def _parts(composer: str, rewriter: str) -> dict[str, Any]:
    """Returns rewriter and composer without weights; recipes share them."""
    import torch

    from .pipelines.profiles import empty_weights
    from .recipes.outline import make_parts

    named = {"composer": composer, "rewriter": rewriter}
    recipes = (RECIPES | ANIMATOR_RECIPES).values()
    with empty_weights(torch.bfloat16):
        return make_parts(next(recipe for recipe in recipes if named.items() <= recipe.repositories.items()))


def memory_cells(recipe: Recipe | AnimatorRecipe, profiles: Sequence[str]) -> list[str]:
    from .pipelines.profiles import plan_memory

    try:
        stages, cells = recipe_stages(recipe), []
    except (AttributeError, ImportError, RuntimeError):
        # An older diffusers does not have the models of the recipe.
        return [NOT_KNOWN] * len(profiles)
    for profile in profiles:
        try:
            plan = plan_memory(stages, profile)
            cells.append(f"{PLACED[plan.offload]} {plan.peak / GIB:.1f}{'+' * plan.tile}")
        except ValueError:
            cells.append("too large")
    return cells


def _repositories() -> dict[str, tuple[str, str]]:
    """Maps each repository to its licence and to the recipes and the part that use it."""
    users: dict[str, list[tuple[str, str]]] = {}
    licenses = {}
    for part in ("base", "composer", "rewriter"):
        for recipe in RECIPES.values():
            repository = recipe.repositories[part]
            licenses[repository] = recipe.licenses[part]
            users.setdefault(repository, []).append((recipe.name, part))
    texts = {}
    for repository, pairs in users.items():
        names = "all" if len(pairs) == len(RECIPES) else ", ".join(name for name, _ in pairs)
        texts[repository] = (licenses[repository], f"{names}: {pairs[0][1]}")
    return texts


def _sizes() -> dict[str, str]:
    """Maps each repository to the GB of weights that loading fetches. Stops asking the Hub once it does not answer."""
    from .loading.files import repository_files

    sizes, answers = {}, True
    for repository in _repositories():
        size = STORED.get(repository)
        if answers:
            try:
                size = weight_bytes({name: file["size"] for name, file in repository_files(repository)[1].items()})
            except OSError:
                answers = False
        sizes[repository] = NOT_KNOWN if size is None else f"{size / 1e9:.1f}"
    return sizes


def weight_bytes(files: dict[str, int]) -> int:
    """Returns the bytes of the weights that are loaded from a repository's files (path -> bytes), without a variant."""
    return sum(files[name] for name in weight_files(files))


def weight_files(files: Iterable[str], variant: str | None = None) -> list[str]:
    """Returns the weight files that are loaded from a repository's files: of the variant in folders that have it."""
    from .loading.files import component_files

    folders = {str(PurePosixPath(name).parent) for name in files if name.endswith(".safetensors")}
    found = []
    for folder in sorted(folders):
        for kind in dict.fromkeys((variant, None)):
            try:
                names = component_files(files, "" if folder == "." else folder, kind)
            except ValueError:
                continue  # The folder has other names of weights, as "original/" does, or no weights of the variant.
            found += [name for name in names if name.endswith(".safetensors")]
            break
    return found


def training_text(recipe: Recipe) -> str:
    """Returns a config for `fvg train` that trains the recipe's anchor LoRA, with data and cost in comments above it."""
    from .training.config import TrainConfig
    from .training.estimate import estimated_memory, estimated_operations

    facts, values = recipe.facts, training_values(recipe)
    config = TrainConfig(**values)
    memory = sum(estimated_memory(config, facts.transformer_config, facts.vae_stride[1]).values()) / GIB
    shape = facts.transformer_config
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    operations = estimated_operations(
        config, facts.parameters, width, shape["num_layers"], facts.patch_size, facts.vae_stride[1]
    )
    clips = config.steps * config.gradient_accumulation_steps * config.batch_size
    need = "works better with it" if recipe.keeps_first_frame else "does not keep a first frame without it"
    file = f"{recipe.name}.toml"
    head = f"""\
Anchor LoRA for the recipe {recipe.name}: its base {facts.name} {need}.

Command: fvg train --recipe {recipe.name} > {file} && fvg train {file}
  then:  fvg generate "a prompt" --model {recipe.name} --lora {config.output_dir}/weights

Data: videos of at least {min(recipe.clip_lengths)} frames at {facts.frame_rate} per second, with captions, in {config.data}:
  metadata.jsonl has a line {{"{config.video_column}": "1.mp4", "{config.caption_column}": "what happens"}} for each.
  It is not known how many are needed; Pusa (arXiv 2507.16116) used 3,860 for a 14B model.

Cost: {clips} clips in {config.steps} steps. Memory: {memory:.0f} GiB, and about 2 GiB for allocator and libraries;
  at least {operations / H100_PEAK / 3600:.0f} hours of one H100, if all of its {H100_PEAK / 1e12:.0f} TFLOP/s were used, which no run does.
  Both are computed. This training was never run."""
    comments = "".join(f"# {line}".rstrip() + "\n" for line in head.splitlines())
    return comments + "\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def training_values(recipe: Recipe) -> dict[str, Any]:
    """Returns the keys of the config: sizes and frame rate of the base, and the recipe's own values."""
    facts, name = recipe.facts, recipe.facts.name.lower()
    sizes = [(size.height, size.width) for size in facts.sizes]
    return {
        "model": facts.repository,
        "data": "data/videos",
        "cache_dir": f"data/cache-{name}",
        "output_dir": f"outputs/anchor-{name}",
        "buckets": [[length, *size] for length in recipe.clip_lengths for size in sizes],
        "frame_rate": facts.frame_rate,
        "flow_shift": facts.sizes[0].flow_shift or 1.0,
        **recipe.training,
    }


# `fvg doctor` lists these. The second line is optional: attention backends, quantization, video reading and training.
PACKAGES: tuple[str, ...]
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "safetensors", "triton")
PACKAGES += ("flash_attn", "sageattention", "bitsandbytes", "torchao", "gguf", "cv2", "tensorboard", "datasets")


def doctor_text() -> str:
    """Returns versions, devices, attention backends, kernels, and which recipes would run on this machine."""
    import platform
    from importlib import metadata

    import torch

    from . import __version__

    by_module = metadata.packages_distributions()
    lines = [f"python {platform.python_version()} on {platform.platform()}", f"diffusers-fvg {__version__}"]
    found = {name: by_module[name][0] for name in PACKAGES if name in by_module}
    lines += [f"{name} {metadata.version(distribution)}" for name, distribution in found.items()]
    lines.append(f"not installed: {', '.join(name for name in PACKAGES if name not in found) or 'nothing'}")
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        devices = [torch.device(kind, index) for index in range(torch.accelerator.device_count())] + devices
    for device in devices:
        lines += ["", f"{device}: {_device_name(device)}", *_runs_on(device)]
    lines += ["", f"`fvg` uses {devices[0]} unless --device says otherwise."]
    wrap = partial(textwrap.wrap, width=80, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(part for line in lines for part in wrap(line) or [""])


def _device_name(device: Any) -> str:
    import torch

    from .animate.memory import free_bytes

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _threads(torch.get_num_threads())
    return f"{name}, {free_bytes(device) / GIB:.1f} GiB free"


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number != 1)}"


def _fp8_report(device: Any) -> str:
    import torch

    from .animate.quantization import fp8_problem

    problem = fp8_problem(device, torch.bfloat16)
    if problem is None and importlib.util.find_spec("torchao") is None:
        problem = "torchao is not installed"
    return "switches them on" if problem is None else f"fails: {problem}"


def _runs_on(device: Any) -> list[str]:
    from .animate.attention import backend_report
    from .animate.memory import free_bytes
    from .kernels.dispatch import kernel_report
    from .pipelines.profiles import USABLE, plan_memory

    lines = [f"  attention: {backend_report(device)}", f"  kernels: {kernel_report(device)}"]
    lines.append(f"  8-bit products: off; --quantize fp8-dynamic {_fp8_report(device)}")
    lines.append(
        "  anchor LoRA: separate layers, because calls without an anchor switch it off; pipe.fuse_lora() merges it into the "
        "weights, which saves time"
    )
    lines.append("  embedded shapes model: yes")
    profile = "cpu" if device.type == "cpu" else "auto"
    for recipe in RECIPES.values():
        stages = recipe_stages(recipe)
        try:
            plan = plan_memory(stages, profile, int(USABLE * free_bytes(device)))
            tiles = ", decode in tiles" if plan.tile else ""
            answer = f"fits: {PLACED[plan.offload]}{tiles}, {plan.peak / GIB:.1f} GiB (computed)"
        except ValueError as error:
            answer = f"too large: {str(error).partition(', but ')[2].partition(' with offload ')[0]}"
        lines.append(f"  {recipe.name}: {answer}")
    return lines
