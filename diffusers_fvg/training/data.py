"""From a folder of captioned videos to cached latents and text embeddings, and the order in which they are trained on.

Shapes: B batch, C latent channels, F/H/W pixel frames/height/width, f/h/w latent ones, L tokens, D width.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import AutoTokenizer, UMT5EncoderModel

from ..anchor import crop_and_resize, normalize_latents
from ..checks import check_num_frames, check_size, check_texts
from ..media import read_video
from .config import TrainConfig
from .draws import generator_for
from .files import read_whole, write_whole


logger = logging.get_logger(__name__)

# A larger file is known by its size and this many pieces of a mebibyte: reading 11 GB at every start takes longer than
# finding out that nothing has to be encoded.
FINGERPRINT_PIECES, PIECE = 64, 1 << 20
# Slower videos than this share of the frame rate would be padded with copies, which teach stuttering.
SLOWEST = 0.9

Bucket = tuple[int, int, int]


@dataclass(frozen=True)
class Example:
    """A video file and what it shows."""

    path: Path
    caption: str


# -- what there is ----------------------------------------------------------------------------------------------------


def read_examples(config: TrainConfig) -> list[Example]:
    """The rows of `metadata.jsonl` or `metadata.csv` in the folder `config.data`, or of the data set of that name.

    Raises:
        `ValueError`: no such folder, data set or metadata, a row without its columns, an empty caption.
    """
    folder = Path(config.data)
    if not folder.is_dir():
        return _hub_examples(config)
    found = [path for name in ("metadata.jsonl", "metadata.csv") if (path := folder / name).is_file()]
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} of metadata.jsonl and metadata.csv; it needs one of them.")
    rows = _jsonl_rows(found[0]) if found[0].suffix == ".jsonl" else _csv_rows(found[0])
    examples = []
    for number, row in enumerate(rows, 1):
        missing = [name for name in (config.video_column, config.caption_column) if not row.get(name)]
        if missing:
            raise ValueError(f"{found[0]}, row {number} has no {missing}; its columns are {sorted(row)}.")
        check_texts(f"{found[0].name}, row {number}", [row[config.caption_column]])
        examples.append(Example(folder / row[config.video_column], row[config.caption_column]))
    if not examples:
        raise ValueError(f"{found[0]} has no rows.")
    return examples


def _jsonl_rows(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}.") from error
    return rows


def _csv_rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _hub_examples(config: TrainConfig) -> list[Example]:
    """The train split of a data set on the Hub, its videos as files in the cache."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"`data={config.data!r}` is no folder; for the name of a Hugging Face data set `pip install datasets`."
        )
    from datasets import Video, load_dataset

    with PartialState().main_process_first():
        rows = load_dataset(config.data, split="train")
    missing = {config.video_column, config.caption_column} - set(rows.column_names)
    if missing:
        raise ValueError(f"{config.data} has no columns {sorted(missing)}; it has {rows.column_names}.")
    examples = []
    for row in rows.cast_column(config.video_column, Video(decode=False)):
        video, caption = row[config.video_column], row[config.caption_column]
        check_texts(f"a caption of {config.data}", [caption])
        path = video["path"]
        if video["bytes"] is not None:
            path = Path(config.cache_dir) / "videos" / f"{hashlib.sha256(video['bytes']).hexdigest()}.mp4"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(f".{PartialState().process_index}.tmp")
                unfinished.write_bytes(video["bytes"])
                unfinished.replace(path)
        examples.append(Example(Path(path), caption))
    return examples


# -- from a video to a clip -------------------------------------------------------------------------------------------


def frames_available(num_frames: int, source_rate: float, frame_rate: float) -> int:
    """Frames that are left of a video when it is thinned out to `frame_rate`."""
    return int((num_frames - 1) * min(1.0, frame_rate / source_rate) + 1e-6) + 1


def choose_bucket(num_frames: int, height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket for a video: of those it has the frames for, the nearest in aspect ratio, then the longest, then the
    largest that needs no enlarging.

    Args:
        num_frames (`int`): frames at the training frame rate.
        height, width (`int`): pixels of the video.
        buckets (`list` of `(num_frames, height, width)`): to choose from.

    Raises:
        `ValueError`: the video is shorter than every bucket.
    """

    def order(bucket: Bucket) -> tuple[float, int, bool, int]:
        length, bucket_height, bucket_width = bucket
        distance = abs(math.log(width * bucket_height / (height * bucket_width)))
        enlarged = bucket_height > height or bucket_width > width
        area = bucket_height * bucket_width
        return round(distance, 6), -length, enlarged, area if enlarged else -area

    fitting = [bucket for bucket in buckets if bucket[0] <= num_frames]
    if not fitting:
        shortest = min(bucket[0] for bucket in buckets)
        raise ValueError(f"has {num_frames} frames at the training frame rate; the shortest bucket needs {shortest}")
    return min(fitting, key=order)


def read_clip(path: Path, config: TrainConfig) -> torch.Tensor:
    """The beginning of a video at the size of its bucket, `(3, F, H, W)` in [-1, 1], as the pipeline treats an anchor.

    Raises:
        `ValueError`, `OSError`: missing, damaged, too slow, or shorter than every bucket.
    """
    frames, source_rate = read_video(path)
    if source_rate < SLOWEST * config.frame_rate:
        raise ValueError(f"has {source_rate:.4g} frames per second; training is at {config.frame_rate:.4g}")
    available = frames_available(len(frames), source_rate, config.frame_rate)
    num_frames, height, width = choose_bucket(available, *frames.shape[1:3], config.buckets)
    step = max(1.0, source_rate / config.frame_rate)
    chosen = [min(round(index * step), len(frames) - 1) for index in range(num_frames)]
    return torch.stack([crop_and_resize(frames[index], height, width) for index in chosen], dim=1)


# -- encoders ---------------------------------------------------------------------------------------------------------


def model_folder(config: TrainConfig) -> Path:
    """The folder of `config.model`, downloaded if it is a Hub repository: only what training reads."""
    if Path(config.model).is_dir():
        return Path(config.model)
    parts = ["model_index.json"] + [f"{part}/*" for part in ("vae", "text_encoder", "tokenizer", *config.experts)]
    return Path(snapshot_download(config.model, revision=config.revision or None, allow_patterns=parts))


def check_buckets(config: TrainConfig, folder: Path) -> None:
    """Every bucket is a size that VAE and patches of the model divide.

    Raises:
        `ValueError`: naming the nearest sizes that do.
    """
    vae = AutoencoderKLWan.load_config(folder / "vae")
    patch = json.loads((folder / config.experts[0] / "config.json").read_text())["patch_size"]
    for num_frames, height, width in config.buckets:
        check_num_frames(num_frames, vae["scale_factor_temporal"])
        check_size("height", height, vae["scale_factor_spatial"] * patch[1])
        check_size("width", width, vae["scale_factor_spatial"] * patch[2])


def encode_video(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `(3, F, H, W)` in [-1, 1] to normalised latents `(C, f, h, w)`: the mode of the posterior, as at sampling.

    Raises:
        `ValueError`: the latents are not finite.
    """
    with torch.no_grad():
        latents = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()
    latents = normalize_latents(latents.float(), vae)[0].cpu()
    if not torch.isfinite(latents).all():
        raise ValueError("encodes to latents that are not finite")
    return latents


def fingerprint(folder: Path) -> str:
    """Of the files in a component's folder: names, sizes and content, of a large file evenly spread pieces."""
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


class Clips:
    """The cached clips of a run.

    Args:
        latents (`list[Path]`): one file per clip.
        texts (`list[Path]`): one file per clip.
        shapes (`list` of `(C, f, h, w)`): of the latents.
        empty_text (`Path`): of the empty prompt.
        max_sequence_length (`int`): to which embeddings are filled up with zeros, as in `WanPipeline`.
        rejected (`dict[str, str]`): path of a video that cannot be used -> why.
    """

    def __init__(
        self,
        latents: list[Path],
        texts: list[Path],
        shapes: list[tuple[int, ...]],
        empty_text: Path,
        max_sequence_length: int,
        rejected: dict[str, str] | None = None,
    ):
        self.latents, self.texts, self.shapes = latents, texts, shapes
        self.empty_text, self.max_sequence_length = empty_text, max_sequence_length
        self.rejected = rejected or {}

    def __len__(self) -> int:
        return len(self.latents)

    def load(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `(B, C, f, h, w)` of clips of one shape and text embeddings `(B + 1, L, D)`, the empty prompt last."""
        latents = torch.stack([_read(self.latents[index])["latents"] for index in indices])
        texts = [_read(path)["embeds"] for path in [*(self.texts[index] for index in indices), self.empty_text]]
        embeds = texts[0].new_zeros(len(texts), self.max_sequence_length, texts[0].shape[1])
        for row, text in zip(embeds, texts):
            row[: len(text)] = text
        return latents, embeds


def _read(path: Path) -> dict[str, torch.Tensor]:
    whole = read_whole(path)
    if whole is None:
        raise ValueError(f"{path} in the cache is missing or damaged; delete it and start again.")
    return whole[0]


def build_cache(config: TrainConfig, examples: Sequence[Example], folder: Path) -> Clips:
    """Encodes what is not in the cache yet, each process its share, and lets the encoders go.

    Every file appears whole or not at all, so that an interrupted run continues where it stopped. Files are named by the
    content of video or caption and by the settings.

    Args:
        config (`TrainConfig`): cache folder, buckets, frame rate.
        examples (`list[Example]`): from [`read_examples`].
        folder (`Path`): of the model, with `vae`, `text_encoder` and `tokenizer`.

    Raises:
        `ValueError`: a cache of other settings, or too many videos that cannot be used.
    """
    state, cache = PartialState(), Path(config.cache_dir)
    settings = {part: fingerprint(folder / part) for part in ("vae", "text_encoder", "tokenizer")}
    settings["text_dtype"] = str(_text_dtype(config))
    for name in ("buckets", "frame_rate", "max_sequence_length"):
        settings[name] = getattr(config, name)
    settings = json.loads(json.dumps(settings))
    with state.main_process_first():
        _check_settings(cache / "settings.json", settings)
    salt = json.dumps(settings, sort_keys=True)

    captions = sorted({example.caption for example in examples} | {""})
    texts = {caption: cache / "texts" / f"{_key(salt, caption.encode())}.safetensors" for caption in captions}
    missing = [caption for caption in captions if _shape(texts[caption], "embeds") is None]
    # Before anything is written: each process takes its share of what was missing when all of them looked.
    state.wait_for_everyone()
    _cache_texts(config, folder, texts, missing[state.process_index :: state.num_processes])

    mine = range(state.process_index, len(examples), state.num_processes)
    outcomes = dict(gather_object(_cache_videos(config, folder, [(index, examples[index]) for index in mine], salt)))
    rejected = {str(examples[index].path): outcome for index, outcome in outcomes.items() if isinstance(outcome, str)}
    _check_rejected(rejected, len({example.path for example in examples}), config)
    used = [index for index in sorted(outcomes) if not isinstance(outcomes[index], str)]
    return Clips(
        latents=[outcomes[index][0] for index in used],
        texts=[texts[examples[index].caption] for index in used],
        shapes=[outcomes[index][1] for index in used],
        empty_text=texts[""],
        max_sequence_length=config.max_sequence_length,
        rejected=rejected,
    )


def _text_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def _key(salt: str, content: bytes) -> str:
    return hashlib.sha256(salt.encode() + content).hexdigest()


def _check_settings(path: Path, settings: dict) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(settings, indent=2) + "\n")
        unfinished.replace(path)
        return
    found = json.loads(path.read_text())
    differing = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
    if differing:
        raise ValueError(
            f"The cache {path.parent} was made with another {', '.join(differing)}; choose another `cache_dir`, or delete it."
        )


def _shape(path: Path, name: str) -> tuple[int, ...] | None:
    """Shape of a tensor from the header; `None` if the file is missing or cut off."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())
    except (SafetensorError, OSError):
        return None


def _cache_texts(config: TrainConfig, folder: Path, texts: dict[str, Path], captions: list[str]) -> None:
    if not captions:
        return
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=_text_dtype(config))
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=text_encoder.to(PartialState().device),
        vae=None,
        scheduler=None,
        transformer=None,
    )
    for caption in _progress(captions, "texts"):
        with torch.no_grad():
            embeds, _ = pipeline.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
            )
        # What follows the last token is zero: `Clips.load` puts it back.
        length = int(embeds[0].abs().sum(dim=1).nonzero().max()) + 1
        write_whole(texts[caption], {"embeds": embeds[0, :length]})


def _cache_videos(
    config: TrainConfig, folder: Path, examples: list[tuple[int, Example]], salt: str
) -> list[tuple[int, str | tuple[Path, tuple[int, ...]]]]:
    """For each example its index and either the file and shape of its latents or why it cannot be used."""
    vae, outcomes = None, []
    for index, example in _progress(examples, "videos"):
        try:
            with open(example.path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            path = Path(config.cache_dir) / "latents" / f"{_key(salt, content)}.safetensors"
            shape = _shape(path, "latents")
            if shape is None:
                pixels = read_clip(example.path, config)
                if vae is None:
                    # In float32, like the pipelines' own: bfloat16 shifts colours.
                    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
                    vae.to(PartialState().device)
                latents = encode_video(vae, pixels)
                shape = tuple(latents.shape)
                write_whole(path, {"latents": latents})
            outcomes.append((index, (path, shape)))
        except (ValueError, OSError) as error:
            outcomes.append((index, str(error)))
    return outcomes


def _progress(things: list, name: str):
    return tqdm(things, desc=f"encoding {name}", disable=not PartialState().is_main_process or not things)


def _check_rejected(rejected: dict[str, str], total: int, config: TrainConfig) -> None:
    if not rejected:
        return
    names = "; ".join(f"{path}: {reason}" for path, reason in sorted(rejected.items()))
    text = f"{len(rejected)} of {total} videos cannot be used: {names}."
    if len(rejected) > config.max_rejected_share * total or len(rejected) == total:
        raise ValueError(f"{text} Mend or remove them, or raise `max_rejected_share={config.max_rejected_share}`.")
    if PartialState().is_main_process:
        logger.warning(text)


# -- the order --------------------------------------------------------------------------------------------------------


class BatchOrder:
    """Which clips make up the n-th batch, for any n: nothing has to be remembered to continue.

    An epoch goes through every clip, in batches of one shape. What does not fill a batch is filled up from the beginning
    of its shape's own order, so that nothing is left out.

    Args:
        shapes (`list[tuple]`): of each clip.
        batch_size (`int`): over all processes.
        seed (`int`): of the order.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], batch_size: int, seed: int):
        self.groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, shape in enumerate(shapes):
            self.groups[shape].append(index)
        self.batch_size, self.seed = batch_size, seed
        self.batches_per_epoch = sum(math.ceil(len(group) / batch_size) for group in self.groups.values())
        self._epoch: tuple[int, list[list[int]]] | None = None

    def __getitem__(self, number: int) -> list[int]:
        epoch, index = divmod(number, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return self._epoch[1][index]

    def _batches(self, epoch: int) -> list[list[int]]:
        generator, batches = generator_for("order", self.seed, epoch), []
        for group in self.groups.values():
            order = [group[i] for i in torch.randperm(len(group), generator=generator)]
            for start in range(0, len(order), self.batch_size):
                wanted = range(start, start + self.batch_size)
                batches.append([order[i % len(order)] for i in wanted])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


class Prefetcher:
    """Batches of one process, the next one read while this one is trained on.

    Args:
        clips ([`Clips`]): what to load.
        order ([`BatchOrder`]): over all processes.
        process_index, batch_size (`int`): which slice of each batch is this process's.
    """

    def __init__(self, clips: Clips, order: BatchOrder, process_index: int, batch_size: int):
        self.clips, self.order = clips, order
        self.slice = slice(process_index * batch_size, (process_index + 1) * batch_size)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, object] | None = None

    def load(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch `number` of this process; see [`Clips.load`]."""
        if self._next is None or self._next[0] != number:
            self._next = self._submit(number)
        batch = self._next[1].result()
        self._next = self._submit(number + 1)
        return batch

    def close(self) -> None:
        self._pool.shutdown()

    def _submit(self, number: int):
        return number, self._pool.submit(self.clips.load, self.order[number][self.slice])
