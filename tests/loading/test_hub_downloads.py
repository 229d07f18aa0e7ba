"""Pipelines that come from a Hub, by diffusers' own download and by references: what is cut off, killed or wrong is told, and is
never taken as whole."""

import hashlib
import itertools
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from hub_server import DOWNLOADS
from killing import kills
from tiny import tiny_composer, tiny_pipeline, tiny_rewriter, tiny_wan_components

from diffusers_fvg import assemble, recipes


KILLS = 20
# The repository that is loaded, and those whose files it takes.
REPOSITORIES = {"org/whole": {"org/whole"}, "org/light": {"org/light", "org/base", "org/t2i", "org/chat"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("repositories")
    tiny_pipeline().save_pretrained(root / "whole")
    WanPipeline(**tiny_wan_components()).save_pretrained(root / "base")
    tiny_composer().pipeline.save_pretrained(root / "t2i")
    rewriter = tiny_rewriter()
    rewriter.model.save_pretrained(root / "chat")
    rewriter.tokenizer.save_pretrained(root / "chat")
    return root


@pytest.fixture
def org(hub, hasty_client, folders, tmp_path):
    """The Hub with a repository that holds everything, and one that names others."""
    for name in ("whole", "base", "t2i", "chat"):
        hub.add(f"org/{name}", folders / name)
    parts = {"base": "org/base", "composer": "org/t2i", "rewriter": "org/chat"}
    assemble(tmp_path / "light", **parts, cache_dir=tmp_path / "assembling")
    hub.add("org/light", tmp_path / "light")
    return hub


def load(name: str, cache: Path, **options) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(name, cache_dir=cache, **options)


def weights(pipe) -> dict[str, torch.Tensor]:
    names = ("rewriter", "composer", "text_encoder", "vae", "transformer")
    return {f"{name}.{key}": value for name in names for key, value in getattr(pipe, name).state_dict().items()}


def held(cache: Path) -> dict[str, str]:
    """What the cache gives under a name: repository, commit and path, and the content's hash."""
    files = (path for path in cache.glob("models--*/snapshots/**/*") if path.is_file())
    return {path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def truths():
    return {}


@pytest.fixture
def truth(org, truths, tmp_path):
    """`truth(load, name)`: what the cache holds in the end and the weights, without a fault."""

    def truth(load, name):
        if (load, name) not in truths:
            pipe = load(name, tmp_path / "truth")
            truths[load, name] = held(tmp_path / "truth"), weights(pipe)
            shutil.rmtree(tmp_path / "truth")
        return truths[load, name]

    return truth


def check_whole(pipe, cache: Path, truth) -> None:
    files, expected = truth
    assert held(cache) == files
    found = weights(pipe)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def load_offline(name: str, cache: Path, truth) -> str:
    """Loads from the cache alone. Returns "whole", or what was said."""
    files, _ = truth
    # Whatever has a name in the cache is what the Hub has under it.
    assert held(cache).items() <= files.items()
    try:
        pipe = load(name, cache, local_files_only=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    check_whole(pipe, cache, truth)
    return "whole"


@pytest.mark.slow
@pytest.mark.parametrize("name", REPOSITORIES)
def test_kills_of_a_download(org, truth, tmp_path, name, capsys):
    """Of a slow Hub. Every second kill meets what the one before it left."""
    cache, counts, expected = tmp_path / "cache", Counter(), truth(load, name)
    org.faults[r"GET .*"] = itertools.repeat("slow")
    for count in kills(lambda: load(name, cache), KILLS, undo=lambda: shutil.rmtree(cache)):
        said = load_offline(name, cache, expected)
        assert said == "whole" or re.search("snapshot .* is incomplete|cannot be loaded|Cannot find", said), said
        counts["whole" if said == "whole" else "told"] += 1
        if count % 2 == 0:
            check_whole(load(name, cache), cache, expected)
            shutil.rmtree(cache)
    check_whole(load(name, cache), cache, expected)
    with capsys.disabled():
        print(f"\ndownload of {name}: {KILLS} kills, offline afterwards {dict(counts)}, half 0")


# -- a Hub that fails -------------------------------------------------------------------------------------------------


def load_by_name(name: str, cache: Path) -> DiffusionPipeline:
    """As the command line does."""
    return recipes.load(name, cache_dir=cache, dtype=torch.float32)


QUICK = (("listing", 500, "org/light"), ("large file", "cut", "org/whole"))


@pytest.mark.parametrize(
    ("kind", "fault", "name"),
    [
        pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow)
        for row in itertools.product(DOWNLOADS, (429, 500, "cut", "slow", 2.0), REPOSITORIES)
    ],
)
def test_a_hub_that_fails_gives_all_or_is_told(org, truth, tmp_path, kind, fault, name):
    """For a while or for good; afterwards the same call goes through."""
    cache, expected = tmp_path / "cache", truth(load_by_name, name)
    for faults in (iter([fault, fault]), itertools.repeat(fault)):
        org.faults[DOWNLOADS[kind]] = faults
        try:
            check_whole(load_by_name(name, cache), cache, expected)
        except OSError as error:
            assert " names org/" in str(error) and "cannot be loaded" in str(error) and len(str(error)) < 1000
            assert held(cache).items() <= expected[0].items()
        org.faults.clear()
        check_whole(load_by_name(name, cache), cache, expected)
        shutil.rmtree(cache)


WEIGHTS, CONFIG = "transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"


@pytest.mark.slow
@pytest.mark.parametrize("name", REPOSITORIES)
@pytest.mark.parametrize(("file", "size"), [(WEIGHTS, 0), (WEIGHTS, 100), (WEIGHTS, 10**9), (CONFIG, 10**9)])
def test_a_size_that_is_a_lie_is_told(org, truth, tmp_path, name, file, size):
    cache, expected = tmp_path / "cache", truth(load_by_name, name)
    org.sizes[file] = size
    try:
        pipe = load_by_name(name, cache)
    except OSError as error:
        # Without a byte of it the client asks for none; then it is the file that is told.
        told = (
            "names org/.* cannot be loaded: .* size|names (org/.*) on the Hub, whose file|Unable to load weights .*"
            + file
        )
        found = re.search(told, str(error))
        assert found, error
        if found[1]:
            # What was said is not kept.
            repository = found[1].partition("@")[0].replace("/", "--")
            assert not list(cache.glob(f"models--{repository}/trees/*.json"))
    else:
        # Of a small file the client takes the answer's own length.
        assert file == CONFIG and name == "org/whole"
        check_whole(pipe, cache, expected)
    org.sizes.clear()
    # The client remembers what it read from the first folder as long as the process lives.
    check_whole(load_by_name(name, tmp_path / "other"), tmp_path / "other", expected)
