"""Encodes captioned videos to cached latents and text embeddings.

Shapes: B batch, C latent channels, F/H/W pixel frames/height/width, f/h/w latent ones, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..checks import check_finite
from .batches import Clips
from .config import TrainConfig
from .draws import appended_frames
from .families import CogVideoX, Wan, text_pipeline
from .files import write_text_whole, write_whole
from .metadata import Example
from .videos import read_clips


logger = logging.get_logger(__name__)

# The fingerprint of a larger file covers its size and this many pieces of 1 MiB: reading 11 GB at every start would take longer
# than all other checks of the cache.
FINGERPRINT_PIECES, PIECE = 64, 1 << 20
# Version of the code that chooses and rotates the frames of a file's clips. A new version needs a new cache.
READER = 2
# Small clips are encoded together, up to this many pixels. Encoding them one at a time is three times as slow.
PIXELS_AT_ONCE = 1 << 19


# -- encoders ---------------------------------------------------------------------------------------------------------


def model_folder(config: TrainConfig, weights: bool = True) -> Path:
    """Returns the folder of `config.model`; downloads the files that training needs from the Hub, or without `weights` only
    configs."""
    if Path(config.model).is_dir():
        return Path(config.model)
    folders = ("vae", "text_encoder", "tokenizer", "scheduler", *config.experts)
    parts = ["model_index.json", *(f"{part}/*" if weights else f"{part}/*config.json" for part in folders)]
    return Path(snapshot_download(config.model, revision=config.revision or None, allow_patterns=parts))


def fingerprint(folder: Path) -> str:
    """Returns a digest of a folder's files: names, sizes and content (for large files, evenly spread pieces of it)."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= FINGERPRINT_PIECES * PIECE:
                digest.update(file.read())
                continue
            for piece in range(FINGERPRINT_PIECES):
                file.seek((size - PIECE) * piece // (FINGERPRINT_PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()


# -- the cache --------------------------------------------------------------------------------------------------------


def stock_text_encoding(
    config: TrainConfig, folder: Path, family: Wan | CogVideoX
) -> Callable[[str], tuple[dict[str, torch.Tensor], int]]:
    """Returns a function that encodes a text with diffusers' pipeline to `{"embeds": (L, D)}` and its number of tokens."""
    pipeline = text_pipeline(family, folder, _text_dtype(config), PartialState().device)

    def encode(text: str) -> tuple[dict[str, torch.Tensor], int]:
        embeds, _ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
        )
        return {"embeds": without_padding(embeds[0])}, len(pipeline.tokenizer(text).input_ids)

    return encode


def without_padding(embeds: torch.Tensor) -> torch.Tensor:
    """Removes the zero tokens at the end of embeddings `(L, D)`; `Clips.load` adds them again."""
    return embeds[: int(embeds.abs().sum(dim=1).nonzero().max()) + 1]


def build_cache(
    config: TrainConfig,
    examples: Sequence[Example],
    folder: Path,
    family: Wan | CogVideoX,
    text_encoding: Callable[..., Callable[[str], tuple[dict[str, torch.Tensor], int]]] = stock_text_encoding,
) -> Clips:
    """Encodes what is not in the cache yet, each process a part of it, and releases the encoders.

    Every file is written completely or not at all, so that an interrupted run continues where it stopped. A file's name is a
    digest of the settings and of the content of the video or caption.

    Args:
        config (`TrainConfig`): cache folder, buckets, frame rate.
        examples (`list[Example]`): output of [`read_examples`].
        folder (`Path`): folder of the model, with `vae`, `text_encoder` and `tokenizer`.
        family (`Wan` or `CogVideoX`): family of the model.
        text_encoding (`Callable`, *optional*): called with config, folder and family if there are texts to encode; returns
            the function that encodes a text.

    Raises:
        `ValueError`: the cache was made with other settings, or too many videos cannot be used.
    """
    state, cache = PartialState(), Path(config.cache_dir)
    settings: dict[str, Any] = {part: fingerprint(path) for part, path in family.encoders(folder).items()}
    settings |= {"text_dtype": str(_text_dtype(config)), "reader": READER}
    for name in family.cache_settings:
        settings[name] = getattr(config, name)
    if family.takes_pictures and config.anchor_form == "appended":
        settings["pictures"] = config.anchor_position
    settings = json.loads(json.dumps(settings))
    with state.main_process_first():
        _check_settings(cache / "settings.json", settings)
    salt = json.dumps(settings, sort_keys=True)

    captions = sorted({example.caption for example in examples} | {config.negative_prompt})
    texts = {caption: cache / "texts" / f"{_key(salt, caption.encode())}.safetensors" for caption in captions}
    missing = [caption for caption in captions if _header(texts[caption], "embeds") is None]
    # Wait before anything is written, so that all processes divide the same list of missing captions.
    state.wait_for_everyone()
    _cache_texts(
        texts,
        missing[state.process_index :: state.num_processes],
        lambda: text_encoding(config, folder, family),
    )
    state.wait_for_everyone()
    _tell_of_long_captions(texts, config)

    mine = range(state.process_index, len(examples), state.num_processes)
    outcomes = dict(
        gather_object(_cache_videos(config, folder, family, [(index, examples[index]) for index in mine], salt))
    )
    rejected = {str(examples[index].path): outcome for index, outcome in outcomes.items() if isinstance(outcome, str)}
    _check_rejected(rejected, len({example.path for example in examples}), config)
    clips = [
        (path, texts[examples[index].caption], shape, examples[index].repeats)
        for index, outcome in sorted(outcomes.items())
        if not isinstance(outcome, str)
        for path, shape in outcome
    ]
    columns: list[list[Any]] = [list(column) for column in zip(*clips)]
    latents, texts_of_clips, shapes, repeats = columns
    return Clips(
        latents=latents,
        texts=texts_of_clips,
        shapes=shapes,
        empty_text=texts[config.negative_prompt],
        max_sequence_length=config.max_sequence_length,
        rejected=rejected,
        repeats=repeats,
    )


def _text_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def _key(salt: str, content: bytes) -> str:
    return hashlib.sha256(salt.encode() + content).hexdigest()


def _check_settings(path: Path, settings: dict) -> None:
    if not path.exists():
        write_text_whole(path, json.dumps(settings, indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    differing = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
    if differing:
        raise ValueError(
            f"The cache {path.parent} was made with another {', '.join(differing)}; choose another `cache_dir`, or delete it."
        )


def _header(path: Path, name: str) -> tuple[tuple[int, ...], dict[str, str]] | None:
    """Returns a tensor's shape and the file's metadata, or `None` if the file is missing or incomplete."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(name).get_shape()), file.metadata()
    except (SafetensorError, OSError):
        return None


def _cache_texts(texts: dict[str, Path], captions: list[str], make_encoding: Callable) -> None:
    if not captions:
        return
    encode = make_encoding()
    for caption in _progress(captions, "texts"):
        with torch.no_grad():
            tensors, tokens = encode(caption)
        for name, tensor in tensors.items():
            check_finite(f"{name} of the caption {caption[:80]!r}", tensor)
        write_whole(texts[caption], tensors, {"tokens": str(tokens)})


def _tell_of_long_captions(texts: dict[str, Path], config: TrainConfig) -> None:
    """Warns of captions with more tokens than the model reads, whose ends have no effect."""
    limit, long = config.max_sequence_length, []
    for caption, path in texts.items():
        _, metadata = _header(path, "embeds") or (None, {})
        # Caches of earlier versions have no number of tokens.
        if int(metadata.get("tokens", 0)) > limit:
            long.append((int(metadata["tokens"]), caption))
    if long and PartialState().is_main_process:
        most, caption = max(long)
        logger.warning(
            f"{len(long)} of {len(texts)} captions have more than the {limit} tokens that are read, up to {most}. The rest of "
            f"them has no effect: shorten them, or raise `max_sequence_length={limit}`. The longest begins {caption[:80]!r}."
        )


def _cache_videos(
    config: TrainConfig, folder: Path, family: Wan | CogVideoX, examples: list[tuple[int, Example]], salt: str
) -> list[tuple[int, str | list[tuple[Path, tuple[int, ...]]]]]:
    """Returns for each example its index, and files and shapes of its clips' latents or the reason why it cannot be used."""
    encoder = _LatentWriter(config, folder, family)
    found: dict[int, str | list[Path]] = {}
    for index, example in _progress(examples, "videos"):
        try:
            with open(example.path, "rb") as file:
                own = salt + repr(example.buckets) if example.buckets else salt
                key = _key(own, hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            found[index] = str(error)
            continue
        first = Path(config.cache_dir) / "latents" / f"{key}-0.safetensors"
        found[index] = paths = _clip_paths(first)
        if all(_header(path, "latents") is not None for path in paths):
            continue
        clips = _attempts(read_clips(example.path, config, example.buckets))
        for number, (count, pixels) in enumerate(clips):
            if count is None:
                found[index] = pixels
                break
            encoder.add(first.with_name(f"{key}-{number}.safetensors"), pixels, {"clips": str(count)})
            found[index] = [first.with_name(f"{key}-{number}.safetensors") for number in range(count)]
    encoder.flush()
    return [
        (index, paths if isinstance(paths, str) else [(path, _shape(path)) for path in paths])
        for index, paths in found.items()
    ]


def _attempts(clips: Iterator[tuple[int, torch.Tensor]]) -> Iterator[tuple[int | None, torch.Tensor | str]]:
    """Yields the output of [`read_clips`], and `None` with the reason if it fails.

    Only errors of reading are caught here, not those of the consumer between two clips, such as a full disk.
    """
    try:
        yield from clips
    except (ValueError, OSError) as error:
        yield None, str(error)


def _shape(path: Path) -> tuple[int, ...]:
    header = _header(path, "latents")
    assert header is not None  # The file has just been written or checked.
    return header[0]


def _clip_paths(first: Path) -> list[Path]:
    """Returns the files of all clips of a video; the metadata of the first clip's file holds their number."""
    header = _header(first, "latents")
    count = int(header[1]["clips"]) if header else 1
    return [first.with_name(first.name.replace("-0.", f"-{number}.")) for number in range(count)]


class _LatentWriter:
    """Encodes clips to files, several small ones at once, with the frames that may become appended anchors. Loads the VAE with
    the first clip."""

    def __init__(self, config: TrainConfig, folder: Path, family: Wan | CogVideoX):
        self.config, self.folder, self.family = config, folder, family
        self.vae: Any = None
        self.waiting: list[tuple[Path, torch.Tensor, dict[str, str]]] = []

    def add(self, path: Path, pixels: torch.Tensor, metadata: dict[str, str]) -> None:
        if self.waiting and self.waiting[0][1].shape != pixels.shape:
            self.flush()
        self.waiting.append((path, pixels, metadata))
        if (len(self.waiting) + 1) * pixels[0].numel() > PIXELS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        if self.vae is None:
            # The VAE runs in float32 as in the pipelines, because bfloat16 shifts colours.
            self.vae = self.family.vae.from_pretrained(self.folder / "vae", torch_dtype=torch.float32)
            self.vae.to(PartialState().device)
        paths, pixels, metadata = zip(*self.waiting)
        self.waiting = []
        cached = self.family.cached(self.vae, torch.stack(pixels))
        for path, clip, tensors, values in zip(paths, pixels, cached, metadata):
            if not torch.isfinite(tensors["latents"]).all():
                raise RuntimeError(f"The VAE in {self.folder} returns latents that are not finite.")
            write_whole(path, tensors | self._pictures(path.stem, clip), values)

    def _pictures(self, name: str, clip: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns latents `(C, n, h, w)` of a clip's frames that may become appended anchors, and the indices of these frames.

        `clip` has shape `(3, F, H, W)`.
        """
        frames = appended_frames(self.config, name, clip.shape[1]) if self.family.takes_pictures else []
        if not frames:
            return {}
        alone = clip[:, frames].transpose(0, 1)[:, :, None]
        parts = alone.split(max(1, PIXELS_AT_ONCE // alone[0].numel()))
        latents = torch.cat([self.family.encode(self.vae, part) for part in parts])[:, :, 0]
        return {"pictures": latents.transpose(0, 1).contiguous(), "frames": torch.tensor(frames)}


def _progress(things: list, name: str):
    return tqdm(things, desc=f"encoding {name}", disable=not PartialState().is_main_process or not things)


def _check_rejected(rejected: dict[str, str], total: int, config: TrainConfig) -> None:
    if not rejected:
        return
    names = "; ".join(f"{path}: {reason}" for path, reason in sorted(rejected.items()))
    text = f"{len(rejected)} of {total} videos cannot be used: {names}."
    if len(rejected) > config.max_rejected_share * total or len(rejected) == total:
        raise ValueError(f"{text} Repair or remove them, or raise `max_rejected_share={config.max_rejected_share}`.")
    if PartialState().is_main_process:
        logger.warning(text)
