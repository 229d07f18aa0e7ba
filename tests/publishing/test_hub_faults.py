"""A Hub that is slow, cuts connections, answers 429 and 500, or lies about sizes: it works in the end, or one line says what is."""

import itertools

import numpy as np
import pytest
from hub_server import DOWNLOADS
from safetensors.numpy import load_file, save_file

from diffusers_fvg import push
from diffusers_fvg.loading.files import fetch


LARGE, SMALL = "vae/model.safetensors", "vae/config.json"
# Seconds.
LATE = 0.5
VALUES = np.arange(50_000, dtype=np.float32)


@pytest.fixture
def org(hub, hasty_client, tmp_path):
    """The Hub with the repository org/name."""
    (tmp_path / "repository" / "vae").mkdir(parents=True)
    save_file({"a": VALUES}, tmp_path / "repository" / LARGE)
    (tmp_path / "repository" / SMALL).write_text("{}")
    hub.add("org/name", tmp_path / "repository")
    return hub


def download(tmp_path):
    folder, names = fetch("org/name", None, lambda names: [LARGE, SMALL], "`vae`", cache_dir=tmp_path / "cache")
    return load_file(folder / LARGE)["a"]


@pytest.mark.parametrize("fault", [500, "cut"])
@pytest.mark.parametrize("request_", DOWNLOADS.values(), ids=DOWNLOADS)
def test_what_passes_is_waited_for(org, tmp_path, request_, fault):
    org.faults[request_] = iter([fault, fault])
    try:
        assert np.array_equal(download(tmp_path), VALUES)
    except OSError as error:
        # Not every request is tried again by the client; then it is one line, and the next call goes on.
        check_told(error)
        org.faults.clear()
        assert np.array_equal(download(tmp_path), VALUES)


def check_told(error) -> None:
    text = str(error)
    assert "`vae` names org/name on the Hub" in text and len(text) < 1000


@pytest.mark.parametrize("fault", [429, "cut", LATE])
@pytest.mark.parametrize("request_", DOWNLOADS.values(), ids=DOWNLOADS)
def test_what_stays_is_told_and_nothing_half_is_taken_as_whole(org, tmp_path, monkeypatch, request_, fault):
    if fault == LATE and request_ != DOWNLOADS["large file"]:
        pytest.skip("the client waits for all answers in one way")
    org.faults[request_] = itertools.repeat(fault)
    try:
        with monkeypatch.context() as patch:
            if fault == LATE:
                patch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", LATE / 5)
            values = download(tmp_path)
    except OSError as error:
        check_told(error)
    else:
        # A request without a body cannot be cut, and what is slow comes in the end.
        assert fault == LATE or fault == "cut" and request_ == DOWNLOADS["looking"]
        assert np.array_equal(values, VALUES)
    org.faults.clear()
    assert np.array_equal(download(tmp_path), VALUES)


@pytest.mark.parametrize(("name", "size"), [(LARGE, 0), (LARGE, 100), (LARGE, 10**9), (SMALL, 10**9)])
def test_a_size_that_is_a_lie_is_told(org, tmp_path, name, size):
    org.sizes[name] = size
    with pytest.raises(OSError, match="`vae` names org/name on the Hub.*(bytes|size|consisten|content)"):
        download(tmp_path)
    org.sizes.clear()
    assert np.array_equal(download(tmp_path), VALUES)


# -- pushing ----------------------------------------------------------------------------------------------------------

UPLOADS = {
    "making": r"POST /api/repos/create",
    "asking": r"POST .*/preupload/.*",
    "batch": r"POST .*/info/lfs/objects/batch",
    "large file": r"PUT /storage/.*",
    "commit": r"POST .*/commit/.*",
}


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "saved" / "weights").mkdir(parents=True)
    save_file({"a": VALUES}, tmp_path / "saved" / "weights" / "pytorch_lora_weights.safetensors")
    (tmp_path / "saved" / "weights" / "README.md").write_text("A LoRA.")
    return tmp_path / "saved" / "weights"


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        (UPLOADS[name], fault)
        if (name, fault) in (("making", "cut"), ("asking", 429), ("large file", "cut"), ("commit", 500))
        else pytest.param(UPLOADS[name], fault, marks=pytest.mark.slow)
        for name, fault in itertools.product(UPLOADS, (429, 500, "cut"))
    ],
)
def test_a_push_goes_through_or_is_told_and_done_again(org, saved, tmp_path, request_, fault):
    for faults in (iter([fault]), itertools.repeat(fault)):
        org.faults[request_] = faults
        try:
            push(saved, "org/new", token=org.token)
        except OSError as error:
            # The Hub's own answers are told by its client.
            assert len(str(error)) < 1000 and ("Push again" in str(error) or "the Hub answers" in str(error)), str(
                error
            )
            # All of it or nothing.
            if "org/new" in org.repositories:
                assert org.files("org/new") in ({".gitattributes"}, pushed(saved))
    org.faults.clear()
    push(saved, "org/new", token=org.token)
    assert org.files("org/new") == pushed(saved)


def pushed(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} | {".gitattributes"}
