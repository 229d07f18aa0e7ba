"""Uploads a saved pipeline or a trained LoRA to the Hub."""

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
    """Uploads a saved pipeline (bundled or light) with its card, `schedulers/` and `pipeline.py`, or a trained LoRA with its card.

    The repository is created if it does not exist. Otherwise it is updated: components that are no longer in the folder, or that
    are now references, lose their old files, and other files stay. After an interruption, a second push uploads only the large
    files that are missing. A folder without `README.md` gets a card, unless the repository has one.

    Args:
        folder (`str` or `os.PathLike`): folder written by `save_pretrained` or `fvg assemble`; or the `output_dir` of a training
            run, of which only the folder `weights` is uploaded.
        repository (`str`): name of the repository on the Hub.
        commit_message (`str`, *optional*): defaults to `"Upload pipeline"` or `"Upload LoRA"`.
        private (`bool`, *optional*): whether a new repository is private. An existing one does not change; with `True`, an existing
            public repository is an error.
        create_pr (`bool`): push to a pull request instead of the main branch.
        token (`str` or `bool`, *optional*): Hub token; defaults to that of `hf auth login`.

    Returns:
        `str`: URL of the commit or of the pull request.

    Raises:
        `ValueError`: the folder is neither a pipeline nor a LoRA, the repository is public although `private=True`, or a file
            contains a key or a local path. Nothing is uploaded then.
        `OSError`: the Hub refuses the upload, or the upload was interrupted.
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
            # With an old weight file beside it, diffusers would not follow a reference.
            delete_patterns=[f"{name}/*" for name in components],
        )
    return commit.pr_url or commit.commit_url


@contextlib.contextmanager
def _telling(repository: str) -> Iterator[None]:
    """Adds the repository and the fix to the error of an interrupted upload."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, RuntimeError) and not is_of_connection(error):
            raise
        raise OSError(
            f"The upload to {repository} was interrupted ({error}). Push again; uploaded files are kept."
        ) from error


def _lora_folder(folder: Path) -> Path:
    """Returns the folder of a LoRA's file, which also contains its card and the file of a second expert."""
    path = Path(WEIGHT_NAME)
    for place in (folder, folder / path.parent):
        if (place / path.name).is_file():
            return place
    raise ValueError(
        f"`folder={str(folder)!r}` has neither {DiffusionPipeline.config_name} nor {WEIGHT_NAME}; pass a saved pipeline or a "
        "trained LoRA."
    )


def _check_private(api: HfApi, repository: str) -> None:
    try:
        found = api.repo_info(repository)
    except RepositoryNotFoundError:
        return
    if not found.private:
        raise ValueError(
            f"{repository} is public, and `private=True` applies only to a new repository: make it private in its settings, or "
            "choose another name."
        )
