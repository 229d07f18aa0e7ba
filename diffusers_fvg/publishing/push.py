"""Uploading a saved pipeline, or a trained LoRA, to the Hub."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ..atomic import replacing
from ..loading.files import is_of_connection
from ..lora.anchor_lora import WEIGHT_NAME
from .cards import repository_card
from .privacy import check_nothing_private


_NOT_PUSHED = (".git*", ".cache/*", "**/.cache/*", "__pycache__/*", "**/__pycache__/*", "*.pyc", ".fvg-*", "**/.fvg-*")


def push(
    folder: str | os.PathLike,
    repository: str,
    commit_message: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Uploads a saved pipeline, bundled or light, with its card, `schedulers/` and `pipeline.py`; or a trained LoRA with its card.

    The repository is made if it is not there, otherwise brought up to date: components that are no longer in the folder, or
    now are references, lose their old files; other files stay. Done again after an interruption, it sends only the large
    files that did not arrive. A folder without `README.md` gets a card, unless the repository has one.

    Args:
        folder (`str` or `os.PathLike`): what `save_pretrained` or `fvg assemble` wrote; or a run's `output_dir`, of which the
            folder `weights` alone is uploaded.
        repository (`str`): on the Hub.
        commit_message (`str`, *optional*): `"Upload pipeline"` or `"Upload LoRA"` when left out.
        private (`bool`, *optional*): whether others may not see a repository that is made. One that is there stays as it is,
            and a public one is refused where `True` is asked for.
        create_pr (`bool`): as a pull request, not to the main branch.
        token (`str` or `bool`, *optional*): the one that `hf auth login` keeps when left out.

    Returns:
        `str`: address of the commit, or of the pull request.

    Raises:
        `ValueError`: neither pipeline nor LoRA, a public repository for what shall be private, or a file that holds a key or a
            path of this machine; nothing is uploaded then.
        `OSError`: the Hub refuses, or the upload was interrupted. The Hub's own error, or its cause.
    """
    folder, api = Path(folder), HfApi(token=token)
    index = folder / DiffusionPipeline.config_name
    is_pipeline = index.is_file()
    if not is_pipeline:
        folder = _lora_folder(folder)
    check_nothing_private(folder, token)
    if private:
        _check_private(api, repository)
    with _telling(repository):
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        has_card = (folder / "README.md").is_file() or not is_pipeline or api.file_exists(repository, "README.md")
    if not has_card:
        card = repository_card(folder)
        with replacing(folder / "README.md") as draft:
            card.save(draft)
        check_nothing_private(folder, token)
    values = json.loads(index.read_text()) if is_pipeline else {}
    components = [name for name, value in values.items() if isinstance(value, list)]
    with _telling(repository):
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or f"Upload {'pipeline' if is_pipeline else 'LoRA'}",
            create_pr=create_pr,
            ignore_patterns=list(_NOT_PUSHED),
            # A weight left beside a reference would keep diffusers from fetching the reference.
            delete_patterns=[f"{name}/*" for name in components],
        )
    return commit.pr_url or commit.commit_url


@contextlib.contextmanager
def _telling(repository: str) -> Iterator[None]:
    """Of an upload that was interrupted, which repository's it was and what to do."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, RuntimeError) and not is_of_connection(error):
            raise
        raise OSError(
            f"The upload to {repository} was interrupted ({error}). Push again: what arrived is kept."
        ) from error


def _lora_folder(folder: Path) -> Path:
    """The folder of a LoRA's file: beside it lie its card and, of a second expert, another file."""
    path = Path(WEIGHT_NAME)
    for place in (folder, folder / path.parent):
        if (place / path.name).is_file():
            return place
    raise ValueError(
        f"{str(folder)!r} has neither {DiffusionPipeline.config_name} nor {WEIGHT_NAME}: it is no saved pipeline and no "
        "trained LoRA."
    )


def _check_private(api: HfApi, repository: str) -> None:
    try:
        found = api.repo_info(repository)
    except RepositoryNotFoundError:
        return
    if not found.private:
        raise ValueError(
            f"{repository} is public, and `private=True` hides only a repository that is made: make it private in its settings, "
            "or choose another name."
        )
