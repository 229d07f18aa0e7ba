"""Uploading a saved pipeline to the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from .cards import repository_card
from .privacy import check_nothing_private


_NOT_PUSHED = (".git*", ".cache/*", "**/.cache/*", "__pycache__/*", "**/__pycache__/*", "*.pyc")


def push(
    folder: str | os.PathLike,
    repository: str,
    commit_message: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Uploads a saved pipeline, bundled or light, with its card, `schedulers/` and `pipeline.py`.

    The repository is made if it is not there, otherwise brought up to date: components that are no longer in the folder, or
    now are references, lose their old files; other files stay. Done again after an interruption, it sends only the large
    files that did not arrive. A folder without `README.md` gets a card, unless the repository has one.

    Args:
        folder (`str` or `os.PathLike`): what `save_pretrained` or `fvg assemble` wrote.
        repository (`str`): on the Hub.
        commit_message (`str`, *optional*): `"Upload pipeline"` when left out.
        private (`bool`, *optional*): whether others may not see a repository that is made; an existing one stays as it is.
        create_pr (`bool`): as a pull request, not to the main branch.
        token (`str` or `bool`, *optional*): the one that `hf auth login` keeps when left out.

    Returns:
        `str`: address of the commit, or of the pull request.

    Raises:
        `ValueError`: no saved pipeline, or a file that holds a key or a path of this machine; nothing is uploaded then.
        `OSError`: the Hub refuses, or the upload was interrupted. The Hub's own error, or its cause.
    """
    folder, api = Path(folder), HfApi(token=token)
    index = folder / DiffusionPipeline.config_name
    if not index.is_file():
        raise ValueError(f"{str(folder)!r} has no {index.name}: it is no saved pipeline.")
    check_nothing_private(folder, token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if not (folder / "README.md").is_file() and not api.file_exists(repository, "README.md"):
        repository_card(folder).save(folder / "README.md")
        check_nothing_private(folder, token)
    components = [name for name, value in json.loads(index.read_text()).items() if isinstance(value, list)]
    try:
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or "Upload pipeline",
            create_pr=create_pr,
            ignore_patterns=list(_NOT_PUSHED),
            # A weight left beside a reference would keep diffusers from fetching the reference.
            delete_patterns=[f"{name}/*" for name in components],
        )
    except RuntimeError as error:
        raise OSError(
            f"The upload to {repository} was interrupted ({error}). Push again: what arrived is kept."
        ) from error
    return commit.pr_url or commit.commit_url
