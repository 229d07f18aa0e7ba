"""Parts of an assembled repository: their sources and how they are written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from ..atomic import naming, replacing_entries
from ..loading.files import fetch, repository_files
from ..loading.reading import read_json
from ..schedules.presets import SchedulerPresets


PARTS_NAME = "parts.json"


@dataclass(frozen=True)
class Source:
    """A repository at a commit, or a folder.

    Args:
        name (`str`): name of the repository or folder.
        folder (`Path`, *optional*): the folder; `None` for a repository on the Hub.
        revision (`str`, *optional*): commit of a repository.
        files (`dict`): path -> size in bytes.
        hub (`dict`): `token` and other arguments for the Hub.
    """

    name: str
    folder: Path | None
    revision: str | None
    files: dict[str, int]
    hub: dict[str, Any]

    @classmethod
    def of(cls, name: str | os.PathLike, hub: dict[str, Any]) -> Source:
        """Returns the folder of that name if it exists, else `"org/name"` or `"org/name@revision"` on the Hub, pinned to a commit."""
        folder = Path(name)
        if folder.is_dir():
            paths = [path for path in folder.rglob("*") if path.is_file()]
            files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
            return cls(folder.resolve().name, folder, None, files, hub)
        repository, _, revision = str(name).partition("@")
        try:
            return cls.on_hub(repository, revision or None, hub)
        except (OSError, ValueError) as error:
            raise OSError(f"{str(name)!r} is not a local folder, and the Hub answers: {error}") from error

    @classmethod
    def on_hub(cls, repository: str, revision: str | None, hub: dict[str, Any]) -> Source:
        """Returns a repository on the Hub, even if a local folder has its name."""
        commit, files = repository_files(repository, revision, **hub)
        return cls(repository, None, commit, {path: file["size"] for path, file in files.items()}, hub)

    def fetch(self, names: Sequence[str]) -> Path:
        """Downloads the files if needed, and returns their folder."""
        return self.folder or fetch(self.name, self.revision, lambda _: list(names), "`fvg assemble`", **self.hub)[0]

    def read_json(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            raise ValueError(f"{self.title} has no file {name}.")
        return read_json(self.fetch([name]) / name, f"{name} of {self.title}")

    def license(self) -> str:
        """Returns the licence in the model card, or `"not stated"`."""
        if "README.md" not in self.files:
            return "not stated"
        data = ModelCard.load(self.fetch(["README.md"]) / "README.md", ignore_metadata_errors=True).data
        license = data.get("license") or "not stated"
        return data.get("license_name") or license if license == "other" else license

    @property
    def title(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision[:8]}"


@dataclass(frozen=True)
class Part:
    """A component of an assembled repository.

    Args:
        name (`str`): name of the component.
        source (`Source`): source of the component.
        files (`dict`): path in the source -> path in the repository; the latter is empty for files that only `write` reads.
        refers (`bool`): whether the repository refers to the source, from which the component is downloaded on loading.
        write (`Callable`): writes what is not in `files` to the repository: a reference, settings, a LoRA.
        license (`str`): licence of the source.
    """

    name: str
    source: Source
    files: dict[str, str]
    refers: bool
    write: Callable[[Path], None]
    license: str

    @property
    def bytes(self) -> int:
        return sum(self.source.files[name] for name in self.files)


@dataclass
class Assembly:
    """Contents of an assembled repository. `str()` lists components, licences, files and sizes."""

    index: dict[str, Any]
    presets: SchedulerPresets | None
    parts: list[Part] = field(default_factory=list)

    def write(self, output: Path) -> None:
        """Writes the repository into an empty folder, completely or not at all."""
        with replacing_entries(output, DiffusionPipeline.config_name) as draft, naming(output):
            self._write(draft)

    def _write(self, output: Path) -> None:
        for part in self.parts:
            if not part.refers:
                source = part.source.fetch(list(part.files))
                for name, target in part.files.items():
                    if target:
                        (output / target).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(source / name, output / target)
            part.write(output / part.name)
        if self.presets is not None:
            self.presets.save_pretrained(output / "schedulers")
            next(iter(self.presets.values())).make_scheduler().save_pretrained(output / "scheduler")
        shim = f"from diffusers_fvg import {self.index['_class_name']}  # noqa: F401\n"
        (output / "pipeline.py").write_text(shim)
        write_json(output / DiffusionPipeline.config_name, self.index)
        write_json(output / PARTS_NAME, {part.name: _record(part) for part in self.parts})

    def __str__(self) -> str:
        lines = []
        for part in self.parts:
            kept = "referred to" if part.refers else "copied"
            lines.append(f"{part.name}: {part.source.title}, {kept}, licence {part.license}")
            lines += [f"  {_size(part.source.files[name])}  {name}" for name in part.files]
        inside, outside = (sum(part.bytes for part in self.parts if part.refers is refers) for refers in (False, True))
        lines.append(f"in the repository:         {_size(inside)}")
        lines.append(f"downloaded when loaded:    {_size(outside)}")
        return "\n".join(lines)


def _record(part: Part) -> dict[str, Any]:
    if part.source.folder is not None:
        return {"license": part.license, "bytes": part.bytes}
    return {
        "repository": part.source.name,
        "revision": part.source.revision,
        "license": part.license,
        "bytes": part.bytes,
    }


def _size(count: int) -> str:
    return f"{count / 1e6:12,.3f} MB"


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
