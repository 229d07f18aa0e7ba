"""`fvg assemble`: makes a repository from the names of a base, a text-to-image pipeline, a chat model and an anchor LoRA.

No weights are loaded into memory: a light repository refers to other repositories, a bundled one contains copies of their files.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open

from ..animate import animator as animators
from ..animate.families import is_image_to_video
from ..animate.stock_weights import StockWeights
from ..animate.transformer_anchor import AnchorConditionedTransformer3D
from ..animate.transformer_anchor_cogvideox import AnchorConditionedCogVideoXTransformer3D
from ..animate.transformer_anchor_skyreels import AnchorConditionedSkyReelsV2Transformer3D
from ..atomic import is_empty
from ..checks import check_defaults, check_num_frames, check_size
from ..compose import composer as composers
from ..compose import judge as judges
from ..loading.files import available_variant, component_files
from ..loading.references import REFERENCE_NAME, HubReference
from ..lora.anchor_lora import AnchorLora
from ..lora.loader import EXPERTS, read_lora
from ..models import MODELS, ModelFacts, match_model, model_presets
from ..rewrite import rewriter_files as rewriters
from ..schedules.cogvideox import COGVIDEOX_PRESETS
from ..schedules.presets import WAN_PRESETS, SchedulerPresets
from .parts import Assembly, Part, Source, write_json
from .privacy import PATH


BASE_COMPONENTS = ("tokenizer", "text_encoder", "transformer", "transformer_2", "vae")
# Class of the base's video model -> this package's class for it, its pipeline, and the presets for models without `ModelFacts`.
FAMILIES: dict[str, tuple[type[StockWeights], str, SchedulerPresets]] = {
    name: (kind, pipeline, presets)
    for kind, pipeline, presets in (
        (AnchorConditionedTransformer3D, "FactorizedVideoPipeline", WAN_PRESETS),
        (AnchorConditionedSkyReelsV2Transformer3D, "FactorizedVideoPipeline", WAN_PRESETS),
        (AnchorConditionedCogVideoXTransformer3D, "FactorizedCogVideoXPipeline", COGVIDEOX_PRESETS),
    )
    for name in (kind.stock_class.__name__, kind.__name__)
}


# -- planning ---------------------------------------------------------------------------------------------------------


def assemble(
    output: str | os.PathLike,
    base: str | None = None,
    composer: str | None = None,
    rewriter: str | None = None,
    lora: str | Sequence[str] | None = None,
    presets: Sequence[str] = (),
    *,
    animator: str | None = None,
    light: bool = True,
    dry_run: bool = False,
    anchor_judge: str | None = None,
    variant: str | None = None,
    call_defaults: dict[str, Any] | None = None,
    composer_call_defaults: dict[str, Any] | None = None,
    animator_call_defaults: dict[str, Any] | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Assembly:
    """Makes a repository that `DiffusionPipeline.from_pretrained` loads.

    Each component is named by a folder, or by `"org/name"` or `"org/name@revision"` on the Hub. Revisions are pinned to commits.

    Args:
        output (`str` or `os.PathLike`): empty or new folder.
        base (`str`, *optional*): Wan, SkyReels-V2 diffusion forcing or CogVideoX pipeline in diffusers' format, light or not. Its
            composer, rewriter and presets are ignored. A model in [`models.MODELS`] gives its own size, length, negative prompt
            and presets. Exactly one of `base` and `animator` is required.
        composer (`str`, *optional*): text-to-image pipeline. Without it, the pipeline has no stage 2.
        rewriter (`str`, *optional*): chat model, or folder of a rewriter. Without it, the pipeline has no stage 1.
        lora (`str` or two of them, *optional*): anchor LoRA of any known format: a file, folder or repository, or a pair for the
            high-noise and the low-noise expert.
        presets (`Sequence[str]`): names of presets, the default first, or one folder of presets. By default all presets of the
            model, those for the repository's size first.
        animator (`str`, *optional*): image-to-video pipeline instead of a base; it takes no `lora` and no `presets`. The
            repository is then one of a [`FactorizedImageToVideoPipeline`].
        light (`bool`): store references to Hub repositories instead of copies; files of local folders are always copied.
        dry_run (`bool`): write nothing.
        anchor_judge (`str`, *optional*): model that chooses among pictures, or folder of a judge; see [`AnchorJudge`].
        variant (`str`, *optional*): variant of the weight files, such as `"fp16"`.
        call_defaults (`dict`, *optional*): call defaults of the pipeline (`height`, `width`, `num_frames`, `frame_rate`) instead of
            those of the base or the model.
        composer_call_defaults, animator_call_defaults (`dict`, *optional*): call defaults of the composer and of the animator, such
            as `num_inference_steps`.
        token, cache_dir, local_files_only (*optional*): arguments for the Hub.

    Returns:
        [`Assembly`]: the repository's components with licences, files and sizes.

    Raises:
        `ValueError`: `output` is not empty, the base is not a text-to-video pipeline of a supported family, call defaults are not
            valid for its videos, or the LoRA does not fit it. All but the last are raised before weights are downloaded or copied.
        `OSError`: a component does not exist.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and is_empty(output)):
        raise ValueError(f"`output={str(output)!r}` exists and is not an empty folder; choose another.")
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
    hub = {name: value for name, value in hub.items() if value is not None}
    if (base is None) == (animator is None):
        raise ValueError("Give either a `base` or an `animator`.")
    plans: list[tuple[str, str, Any, Callable[..., list[Part]]]]
    if animator is not None:
        _check_no(lora=lora, presets=presets)
        repository = _with_animator(call_defaults)
        animator_plan = partial(_animator, defaults=animator_call_defaults, variant=variant)
        plans = [("animator", "AnchorAnimator", animator, animator_plan)]
    else:
        _check_no(animator_call_defaults=animator_call_defaults)
        assert base is not None
        repository, anchored = _of_base(Source.of(base, hub), presets, call_defaults, light, variant)
        experts = partial(_lora, anchored=anchored, base=list(repository.parts))
        plans = [("anchor_lora", "AnchorLora", lora, experts)]
    plans += [
        ("composer", "AnchorComposer", composer, partial(_composer, defaults=composer_call_defaults, variant=variant)),
        ("rewriter", "FirstFrameRewriter", rewriter, _rewriter),
        ("anchor_judge", "AnchorJudge", anchor_judge, _judge),
    ]
    for name, class_name, value, plan in plans:
        repository.index[name] = [None, None] if value is None else ["diffusers", class_name]
        if value is not None:
            repository.parts += plan(value, light=light, hub=hub)
    if variant is not None and not any(f".{variant}" in file for part in repository.parts for file in part.files):
        raise ValueError(f"`variant={variant!r}`: no component has weights of this variant; leave it out.")
    if not dry_run:
        repository.write(output)
    return repository


def _check_no(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value:
            around = "a `base`" if name.startswith("animator") else "an `animator`"
            raise ValueError(f"`{name}={value!r}` is not for a repository of {around}; leave it out.")


def _of_base(
    source: Source, presets: Sequence[str], call_defaults: dict[str, Any] | None, light: bool, variant: str | None
) -> tuple[Assembly, type[StockWeights]]:
    """Returns an assembly with the components of a base, and this package's class for its video model."""
    index = source.read_json(DiffusionPipeline.config_name)
    class_name = index.get("transformer", [None, None])[1]
    if class_name == HubReference.__name__:
        class_name = source.read_json(f"transformer/{REFERENCE_NAME}")["class"]
    if class_name not in FAMILIES:
        known = ", ".join(facts.repository for facts in MODELS.values())
        raise ValueError(
            f"The base {source.title}, a {index.get('_class_name')}, has the video model {class_name!r}, not one of "
            f"{tuple(FAMILIES)}. Use a text-to-video model, such as {known}; pass an image-to-video pipeline as `animator`."
        )
    anchored, pipeline, family_presets = FAMILIES[class_name]
    parts: list[Part] = []
    entries: dict[str, Any] = dict.fromkeys(BASE_COMPONENTS, [None, None])
    for name in BASE_COMPONENTS:
        if index.get(name, [None, None])[1] is not None:
            entries[name], part = _base_part(name, index[name], source, light, variant)
            parts.append(part)
    _check_experts(parts, anchored)
    boundary_ratio = index.get("boundary_ratio")
    facts = match_model(_config(next(part for part in parts if part.name == "transformer")), boundary_ratio)
    defaults = facts.call_defaults if facts else {}
    defaults = defaults | (index.get("call_defaults") or {}) | (call_defaults or {})
    _check_call_defaults(defaults, parts, anchored)
    chosen = _presets(presets, facts, defaults, family_presets)
    repository = Assembly({"_class_name": pipeline, "_diffusers_version": diffusers.__version__}, chosen, parts)
    repository.index |= {
        "call_defaults": defaults or None,
        "scheduler": ["diffusers", next(iter(chosen.values())).scheduler_class],
        "schedulers": ["diffusers", "SchedulerPresets"],
        **entries,
    }
    if pipeline == "FactorizedVideoPipeline":
        repository.index |= {
            "boundary_ratio": boundary_ratio,
            "expand_timesteps": bool(index.get("expand_timesteps")),
        }
    else:
        del repository.index["transformer_2"]
    return repository, anchored


def _check_call_defaults(defaults: dict[str, Any], parts: Sequence[Part], anchored: type) -> None:
    """Checks that the VAE and the patch size of this base divide the default size and length."""
    check_defaults(defaults)
    configs = {part.name: _config(part) for part in parts if part.name in ("transformer", "vae")}
    transformer, vae = configs["transformer"], configs.get("vae", {})
    if anchored is AnchorConditionedCogVideoXTransformer3D:
        multiple = 2 ** (len(vae.get("block_out_channels", range(4))) - 1) * transformer.get("patch_size", 2)
        # In sampling, its VAE decodes two latent frames at a time.
        step = 2 * vae.get("temporal_compression_ratio", 4)
    else:
        multiple = vae.get("scale_factor_spatial", 8) * tuple(transformer.get("patch_size", (1, 2, 2)))[1]
        step = vae.get("scale_factor_temporal", 4)
    for name in ("height", "width"):
        if defaults.get(name) is not None:
            check_size(name, defaults[name], multiple)
    if defaults.get("num_frames") is not None:
        check_num_frames(defaults["num_frames"], step)


def _with_animator(call_defaults: dict[str, Any] | None) -> Assembly:
    """Returns an assembly without components; the animator derives its presets from its scheduler."""
    check_defaults(call_defaults)
    name = "FactorizedImageToVideoPipeline"
    index = {"_class_name": name, "_diffusers_version": diffusers.__version__, "schedulers": [None, None]}
    return Assembly(index | {"call_defaults": call_defaults or None}, None)


def _presets(
    names: Sequence[str], facts: ModelFacts | None, defaults: dict[str, Any], of_family: SchedulerPresets
) -> SchedulerPresets:
    if len(names) == 1 and Path(names[0]).is_dir():
        return SchedulerPresets.from_pretrained(names[0])
    known = of_family if facts is None else model_presets(facts, defaults["height"], defaults["width"])
    return SchedulerPresets.of(*(known[name] for name in names or known))


def _check_experts(parts: Sequence[Part], anchored: type[StockWeights]) -> None:
    """Raises `ValueError` for a video model that cannot take anchors, from its configuration alone."""
    configs = {part.name: _config(part) for part in parts if part.name in (*EXPERTS, "vae", "text_encoder")}
    vae, text_width = configs.pop("vae", {}), configs.pop("text_encoder", {}).get("d_model")
    # The name in Wan's VAE, and in CogVideoX's.
    channels = vae.get("z_dim", vae.get("latent_channels"))
    for part in parts:
        if part.name in EXPERTS:
            name = f"`{part.name}` of {part.source.title}"
            anchored.check_text_to_video(configs[part.name], name, channels, text_width)


def _config(part: Part) -> dict[str, Any]:
    return part.source.read_json(next(file for file in part.files if file.endswith("config.json")))


def _base_part(
    name: str, entry: list[str], source: Source, light: bool, variant: str | None
) -> tuple[list[str], Part]:
    subfolder, (library, class_name) = name, entry
    if class_name == HubReference.__name__:
        values = source.read_json(f"{name}/{REFERENCE_NAME}")
        reference = HubReference(class_name=values.pop("class"), **values).values
        source = Source.on_hub(reference["repository"], reference["revision"], source.hub)
        library, class_name, subfolder = reference["library"], reference["class"], reference["subfolder"]
        variant = variant or reference["variant"]
    if class_name in FAMILIES:
        library, class_name = "diffusers", FAMILIES[class_name][0].__name__
    weights = name != "tokenizer"
    if weights:
        inside = [file for file in source.files if file.startswith(f"{subfolder}/")]
        variant = available_variant(inside, variant, f"`{name}` of {source.title}")
    try:
        names = component_files(source.files, subfolder, variant, weights)
    except ValueError as error:
        raise ValueError(f"`{name}` of {source.title}: {error}") from error
    refers = light and source.folder is None
    files = {file: f"{name}/{file.removeprefix(f'{subfolder}/')}" for file in names}
    write: Callable[[Path], None] = _nothing
    if refers:
        reference = HubReference(source.name, library, class_name, source.revision, subfolder, variant)
        entry, write = ["diffusers", HubReference.__name__], reference.save_pretrained
    elif variant is not None and weights:
        # The copy contains only these weights, so that they need no variant in their names.
        files = {file: target.replace(f".{variant}", "", 1) for file, target in files.items()}
    return (entry if refers else [library, class_name]), Part(name, source, files, refers, write, source.license())


def _nothing(folder: Path) -> None:
    """Writes nothing: the files of a copied component are complete."""


def _composer(
    name: str, light: bool, hub: dict[str, Any], defaults: dict[str, Any] | None, variant: str | None
) -> list[Part]:
    return [_pipeline("composer", composers.CONFIG_NAME, Source.of(name, hub), light, defaults, variant)]


def _animator(
    name: str, light: bool, hub: dict[str, Any], defaults: dict[str, Any] | None, variant: str | None
) -> list[Part]:
    source = Source.of(name, hub)
    index = source.read_json(DiffusionPipeline.config_name)
    class_name = str(index.get("_class_name"))
    if not is_image_to_video(class_name, index):
        raise ValueError(
            f"The animator {source.title} is a {class_name}, not an image-to-video pipeline of diffusers; name one."
        )
    return [_pipeline("animator", animators.CONFIG_NAME, source, light, defaults, variant)]


def _pipeline(
    part: str, config: str, source: Source, light: bool, defaults: dict[str, Any] | None, variant: str | None
) -> Part:
    """Plans a diffusers pipeline as a component."""
    check_defaults(defaults)
    settings: dict[str, Any] = {} if defaults is None else {"call_defaults": defaults}
    index, names = source.read_json(DiffusionPipeline.config_name), [DiffusionPipeline.config_name]
    for component, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None:
            inside = [file for file in source.files if file.startswith(f"{component}/")]
            is_model = any(file.endswith((".safetensors", ".bin")) for file in inside)
            here = available_variant(inside, variant, f"`{component}` of {source.title}") if is_model else None
            names += component_files(inside, component, here, weights=is_model)
    refers = light and source.folder is None
    if refers:
        settings |= {"repository": source.name, "revision": source.revision}
    elif config in source.files:
        settings = source.read_json(config) | settings
    files = {file: f"{part}/{file if variant is None else file.replace(f'.{variant}', '', 1)}" for file in names}
    return Part(part, source, files, refers, partial(_write_settings, config, settings), source.license())


def _rewriter(name: str, light: bool, hub: dict[str, Any]) -> list[Part]:
    return _chat_model(
        "rewriter", "tokenizer", rewriters.CONFIG_NAME, rewriters.read_rewriter_config, name, light, hub
    )


def _judge(name: str, light: bool, hub: dict[str, Any]) -> list[Part]:
    return _chat_model("anchor_judge", "processor", judges.CONFIG_NAME, judges.read_judge_config, name, light, hub)


def _chat_model(
    part: str, reader: str, config: str, read: Callable, name: str, light: bool, hub: dict[str, Any]
) -> list[Part]:
    """Plans a component with a transformers model and its tokenizer or processor, in one folder each."""
    source = Source.of(name, hub)
    if config in source.files:
        read(source.fetch([config]) / config)
        files = {file: f"{part}/{file}" for file in source.files if not file.startswith(".")}
        return [Part(part, source, files, False, _nothing, source.license())]
    model, texts = component_files(source.files), component_files(source.files, weights=False)
    refers = light and source.folder is None
    settings = {"model": source.name, "revision": source.revision} if refers else {}
    files = {file: f"{part}/model/{file}" for file in model}
    # Files that are among the model's are not copied twice; `_write_chat_model` copies the configuration, which may name the
    # tokenizer's class.
    files |= {file: f"{part}/{reader}/{file}" for file in texts if file not in model}
    write = partial(_write_chat_model, config, reader, settings, None if refers else source)
    return [Part(part, source, files, refers, write, source.license())]


def _write_settings(name: str, settings: dict[str, Any], folder: Path) -> None:
    write_json(folder / name, settings)


def _write_chat_model(config: str, reader: str, settings: dict[str, Any], source: Source | None, folder: Path) -> None:
    write_json(folder / config, settings)
    if source is not None:
        shutil.copyfile(source.fetch(["config.json"]) / "config.json", folder / reader / "config.json")


def _lora(
    value: str | Sequence[str], light: bool, hub: dict[str, Any], anchored: type[StockWeights], base: list[Part]
) -> list[Part]:
    names = [value] if isinstance(value, (str, os.PathLike)) else value
    sources = [_lora_source(str(name), hub) for name in names]
    write: Callable[[Path], None] = partial(_write_lora, sources, anchored, base)
    parts = []
    for name, (source, files) in zip(("anchor_lora", "anchor_lora_2"), sources):
        # The files are read and not copied: the repository gets one file in diffusers' format.
        parts.append(Part(name, source, dict.fromkeys(files, ""), False, write, source.license()))
        write = _nothing
    return parts


def _lora_source(name: str, hub: dict[str, Any]) -> tuple[Source, list[str]]:
    """Finds a LoRA in a file, a folder, a repository, or a file of a repository (`"org/name/high.safetensors"`)."""
    path = Path(name)
    if path.is_file():
        return Source(path.stem, path.parent, None, {path.name: path.stat().st_size}, hub), [path.name]
    place, at, revision = name.partition("@")
    owner, _, rest = place.partition("/")
    if path.is_dir() or not rest.endswith(".safetensors"):
        source = Source.of(name, hub)
        return source, [
            file for file in source.files if re.fullmatch(r"[^/]+\.safetensors|adapter_config\.json", file)
        ]
    repository, _, file = rest.partition("/")
    source = Source.of(f"{owner}/{repository}{at}{revision}", hub)
    if file not in source.files:
        raise ValueError(f"The LoRA repository {source.title} has no file {file}.")
    return source, [file]


def _write_lora(
    sources: list[tuple[Source, list[str]]], anchored: type[StockWeights], base: list[Part], folder: Path
) -> None:
    experts: dict[str, torch.nn.Module] = {}
    for part in base:
        if part.name in EXPERTS:
            # Only names and shapes are needed, not weights.
            with init_empty_weights(include_buffers=False):
                experts[part.name] = anchored.from_config(_config(part))
    roots = [(source.fetch(files), files) for source, files in sources]
    paths = [str(root / files[0] if len(files) == 1 else root) for root, files in roots]
    names = ", ".join(source.title for source, _ in sources)
    lora = read_lora(paths[0] if len(paths) == 1 else tuple(paths), experts)
    deltas = [name for fit in lora.fits.values() for name in fit.deltas]
    if lora.unmatched or deltas:
        raise ValueError(
            f"The LoRA {names} is not an anchor LoRA of this base: {[*lora.unmatched, *deltas][:8]} fit no layer as a pair of "
            "low-rank matrices."
        )
    missing = [name for name in experts if name not in lora.fits]
    if missing:
        raise ValueError(
            f"The LoRA {names} has no weights for {missing}, but the base has two experts; give a pair, high noise first."
        )
    metadata: dict[str, str] = {}
    for path in lora.labels:
        with safe_open(path, framework="pt") as file:
            metadata |= file.metadata() or {}
    # Alpha has been multiplied into the tensors, so that the file's alpha is no longer valid.
    metadata.pop(LORA_ADAPTER_METADATA_KEY, None)
    # The training config contains local paths of the machine that ran it.
    metadata = {key: PATH.sub(lambda match: PurePath(match[0]).name, value) for key, value in metadata.items()}
    tensors = {f"{name}.{key}": tensor for name, fit in lora.fits.items() for key, tensor in fit.state_dict().items()}
    AnchorLora(tensors, metadata).save_pretrained(folder)
