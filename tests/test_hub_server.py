import hashlib
import urllib.request

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tiny import tiny_transformer, tiny_wan_components


WANTED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def pipeline():
    return WanPipeline(**tiny_wan_components())


def assert_same_weights(loaded, expected):
    for name in ("transformer", "vae", "text_encoder"):
        state = getattr(loaded, name).state_dict()
        for key, value in getattr(expected, name).state_dict().items():
            assert torch.equal(state[key], value), f"{name}.{key}"


def test_push_pull_and_offline(hub, pipeline, tmp_path):
    pipeline.push_to_hub("org/tiny", token=hub.token, private=False)
    HfApi(token=hub.token).upload_file(path_or_fileobj=b"0" * 64, path_in_repo="raw/all.bin", repo_id="org/tiny")
    assert hub.files("org/tiny") == WANTED | {".gitattributes", "README.md", "raw/all.bin"}
    assert hub.downloaded("org/tiny") == set()

    cache = tmp_path / "cache"
    loaded = DiffusionPipeline.from_pretrained("org/tiny", cache_dir=cache)
    assert type(loaded) is WanPipeline
    assert_same_weights(loaded, pipeline)
    assert loaded.tokenizer("a red circle").input_ids == pipeline.tokenizer("a red circle").input_ids
    assert hub.downloaded("org/tiny") == WANTED
    assert len(hub.downloads) == len(WANTED), "each file is fetched once"

    hub.stop()
    assert_same_weights(DiffusionPipeline.from_pretrained("org/tiny", cache_dir=cache), pipeline)
    with pytest.raises(OSError, match="org/tiny"):
        DiffusionPipeline.from_pretrained("org/tiny", cache_dir=tmp_path / "empty")


def test_environment_alone_leads_a_fresh_process_here(hub, pipeline, run_python):
    pipeline.push_to_hub("org/tiny", token=hub.token)
    code = """
        from diffusers import DiffusionPipeline
        print(type(DiffusionPipeline.from_pretrained("org/tiny")).__name__)
    """
    assert run_python(code).split() == ["WanPipeline"]
    assert hub.downloaded("org/tiny") == WANTED


def test_private_repository_needs_its_owners_token(hub):
    owner = HfApi(token=hub.token)
    owner.create_repo("org/secret", private=True)
    owner.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="org/secret")
    owner.upload_file(path_or_fileobj=b"weights", path_in_repo="w.safetensors", repo_id="org/secret")

    with pytest.raises(OSError, match="org/secret") as error:
        DiffusionPipeline.from_pretrained("org/secret")
    assert isinstance(error.value.__cause__, RepositoryNotFoundError)
    assert error.value.__cause__.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError) as error:
        hf_hub_download("org/secret", "config.json", token="hf_stranger")
    assert error.value.response.status_code == 404
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        owner.model_info("org/secret", token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="no write access"):
        HfApi(token="hf_stranger").create_repo("org/other")
    assert hub.downloads == []

    for name in ("config.json", "w.safetensors"):
        hf_hub_download("org/secret", name, token=hub.token)
    # The token goes to the Hub, not to its storage.
    assert hub.downloads == [("org/secret", "config.json", True), ("org/secret", "w.safetensors", False)]


def test_revisions(hub):
    api = HfApi(token=hub.token)
    api.create_repo("org/model")
    for seed, tag in enumerate(["v1", "v2"]):
        tiny_transformer(seed=seed).push_to_hub("org/model", token=hub.token)
        api.create_tag("org/model", tag=tag)
    api.create_branch("org/model", branch="dev/next", revision="v1")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a/b.txt", repo_id="org/model", revision="dev/next")

    first = tiny_transformer().from_pretrained("org/model", revision="v1")
    assert torch.equal(first.proj_out.weight, tiny_transformer(seed=0).proj_out.weight)
    latest = tiny_transformer().from_pretrained("org/model")
    assert torch.equal(latest.proj_out.weight, tiny_transformer(seed=1).proj_out.weight)

    assert "a/b.txt" not in hub.files("org/model")
    tree = api.list_repo_tree("org/model", revision="dev/next", recursive=True)
    assert {"a", "a/b.txt", "config.json"} <= {entry.path for entry in tree}
    assert {e.path for e in api.list_repo_tree("org/model", revision="dev/next")} & {"a", "a/b.txt"} == {"a"}
    assert [e.path for e in api.list_repo_tree("org/model", "a", revision="dev/next")] == ["a/b.txt"]
    api.delete_folder("a", "org/model", revision="dev/next")
    assert "a/b.txt" not in api.list_repo_files("org/model", revision="dev/next")
    refs = api.list_repo_refs("org/model")
    assert {ref.name for ref in refs.branches} == {"main", "dev/next"}
    assert {ref.name: ref.target_commit for ref in refs.tags}["v2"] == api.model_info("org/model").sha

    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/model", "config.json", revision="v3")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("org/model", "missing.json")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/nothing", "config.json")


def test_a_public_repository_is_read_by_all_and_written_by_its_owner(hub):
    HfApi(token=hub.token).create_repo("org/open", private=False)
    hf_hub_download("org/open", ".gitattributes")
    upload = {"path_or_fileobj": b"x", "path_in_repo": "a.txt", "repo_id": "org/open"}
    for token, status in {"hf_stranger": 403, False: 401}.items():
        with pytest.raises(HfHubHTTPError) as error:
            HfApi(token=token).upload_file(**upload)
        assert error.value.response.status_code == status
    assert hub.files("org/open") == {".gitattributes"}


def test_sizes_and_hashes(hub):
    api, data = HfApi(token=hub.token), bytes(range(256)) * 64
    api.create_repo("org/files")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("org/files")
    assert api.create_repo("org/files", exist_ok=True).repo_id == "org/files"
    for name in ("w.bin", "w.txt"):
        api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id="org/files")

    siblings = {s.rfilename: s for s in api.model_info("org/files", files_metadata=True).siblings}
    assert siblings["w.bin"].size == siblings["w.txt"].size == len(data)
    assert siblings["w.bin"].lfs.sha256 == hashlib.sha256(data).hexdigest()
    assert siblings["w.txt"].lfs is None
    # What `git hash-object` says of the same bytes.
    assert siblings["w.txt"].blob_id == hashlib.sha1(b"blob 16384\0" + data).hexdigest()
    assert set(vars(api.model_info("org/files", expand=["sha"]))) >= {"sha"}
    assert api.model_info("org/files", expand=["sha"]).siblings is None

    for name in ("w.bin", "w.txt"):
        url = f"{hub.endpoint}/org/files/resolve/main/{name}"
        for span, expected in {"bytes=10-19": data[10:20], "bytes=16380-": data[16380:]}.items():
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": span})) as answer:
                assert answer.status == 206
                assert answer.read() == expected

    before = len(hub.repositories["org/files"].commits)
    api.upload_file(path_or_fileobj=data, path_in_repo="w.bin", repo_id="org/files")
    assert len(hub.repositories["org/files"].commits) == before, "an unchanged file makes no commit"
