"""Loading by `DiffusionPipeline.from_pretrained`, from a folder and from a Hub, with and without remote code."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from tiny import tiny_pipeline, tiny_transformer

from diffusers_fvg import AnchorComposer, FactorizedVideoPipeline, SchedulerPresets
from diffusers_fvg.lora.anchor_lora import AnchorLora


STAGES = ("rewriter", "composer", "text_encoder", "vae", "transformer")
CHECKED = """
import torch

def load(*arguments, **options):
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(*arguments, dtype=torch.bfloat16, **options)
    assert type(pipe).__name__ == "FactorizedVideoPipeline", type(pipe)
    assert pipe.transformer.dtype == pipe.composer.dtype == pipe.rewriter.dtype == torch.bfloat16
    print("loaded", pipe.composer.call_defaults["num_frames"])
"""


def lora() -> AnchorLora:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    donor = tiny_transformer()
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    state = get_peft_model_state_dict(donor)
    return AnchorLora({f"transformer.{key}": value for key, value in state.items()}, {"note": "tiny"})


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository") / "tiny-fvg"
    tiny_pipeline(anchor_lora=lora()).save_pretrained(folder)
    return folder


@pytest.fixture
def pushed(hub, bundled):
    from huggingface_hub import HfApi

    api = HfApi(token=hub.token)
    api.create_repo("org/fvg")
    api.upload_folder(folder_path=bundled, repo_id="org/fvg")
    return "org/fvg"


def assert_same(loaded, expected):
    for name in STAGES:
        state, truth = getattr(loaded, name).state_dict(), getattr(expected, name).state_dict()
        assert state.keys() == truth.keys(), name
        for key in truth:
            assert torch.equal(state[key], truth[key]), f"{name}.{key}"
    assert loaded.schedulers == expected.schedulers
    assert loaded.anchor_lora.state_dict.keys() == expected.anchor_lora.state_dict.keys()


def test_index_names_no_module_of_ours(bundled):
    # Frozen: what a repository says about our classes must load with every later version.
    index = json.loads((bundled / "model_index.json").read_text())
    assert index["_class_name"] == "FactorizedVideoPipeline"
    assert index["rewriter"] == ["diffusers", "FirstFrameRewriter"]
    assert index["composer"] == ["diffusers", "AnchorComposer"]
    assert index["transformer"] == ["diffusers", "AnchorConditionedTransformer3D"]
    assert index["anchor_lora"] == ["diffusers", "AnchorLora"]
    assert index["schedulers"] == ["diffusers", "SchedulerPresets"]
    assert "diffusers_fvg" not in json.dumps(index)


def test_folder_by_the_base_class_and_by_ours(bundled):
    expected = tiny_pipeline(anchor_lora=lora())
    for cls in (DiffusionPipeline, FactorizedVideoPipeline):
        loaded = cls.from_pretrained(bundled)
        assert type(loaded) is FactorizedVideoPipeline
        assert_same(loaded, FactorizedVideoPipeline.from_pretrained(bundled))
        base = loaded.transformer.state_dict()
        for key, value in expected.transformer.state_dict().items():
            if ".lora_" not in key:
                assert torch.equal(base[key], value), key


def test_saved_again_it_loads_again(bundled, tmp_path):
    first = DiffusionPipeline.from_pretrained(bundled)
    first.save_pretrained(tmp_path / "again")
    assert_same(DiffusionPipeline.from_pretrained(tmp_path / "again"), first)
    files = [
        {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} for root in (bundled, tmp_path / "again")
    ]
    assert files[0] == files[1]


def test_replaced_component_is_still_saved_under_its_public_name(bundled, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(bundled)
    pipe.transformer = FactorizedVideoPipeline.from_pretrained(bundled).transformer
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][0] == "diffusers"


@pytest.mark.parametrize("cls", [DiffusionPipeline, FactorizedVideoPipeline])
def test_a_stage_can_be_left_out_or_replaced(bundled, cls):
    other = tiny_pipeline().composer
    pipe = cls.from_pretrained(bundled, rewriter=None, anchor_lora=None, composer=other)
    assert pipe.rewriter is None and pipe.anchor_lora is None and pipe.composer is other
    assert not getattr(pipe.transformer, "peft_config", None)


class OtherComposer(AnchorComposer):
    """Somebody's own, in a module of theirs."""


def test_a_passed_component_is_checked_against_the_class_that_it_replaces(bundled, tmp_path):
    whole = tiny_pipeline()
    for component in (whole.rewriter, whole.schedulers, whole.vae):
        with pytest.raises(ValueError, match="(should|must) be .*AnchorComposer"):
            DiffusionPipeline.from_pretrained(bundled, composer=component)
    other = OtherComposer(whole.composer.pipeline)
    assert DiffusionPipeline.from_pretrained(bundled, composer=other, rewriter=None).composer is other
    tiny_pipeline(composer=other, rewriter=None).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path).composer) is OtherComposer
    assert DiffusionPipeline.from_pretrained(tmp_path, composer=whole.composer).composer is whole.composer
    with pytest.raises(ValueError, match="(should|must) be .*AnchorComposer"):
        DiffusionPipeline.from_pretrained(tmp_path, composer=whole.vae)


def test_stock_diffusers_reads_the_scheduler_configs(bundled):
    scheduler = UniPCMultistepScheduler.from_pretrained(bundled, subfolder="schedulers/full-50")
    assert scheduler.config.use_flow_sigmas
    assert list(SchedulerPresets.from_pretrained(bundled / "schedulers")) == ["anchored-15", "full-50"]


def test_the_package_alone_imports_neither_torch_nor_diffusers(run_python):
    code = "import sys, diffusers_fvg; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    assert run_python(code, new_interpreter=True) == "[]\n"


def test_a_fresh_process_that_imports_the_package(hub, pushed, bundled, run_python):
    """From a folder, from the Hub, and from its cache in another process that is offline."""
    code = f"""
import sys, diffusers_fvg
assert "diffusers" not in sys.modules
{CHECKED}
load({str(bundled)!r})
# diffusers' automatic pipelines import the pipelines of every family, which takes seconds: they are left unread.
print("auto", "diffusers.pipelines.auto_pipeline" in sys.modules)
import diffusers
assert diffusers.FactorizedVideoPipeline is diffusers_fvg.FactorizedVideoPipeline
load({pushed!r})
"""
    assert run_python(code).splitlines() == ["loaded 1", "auto False", "loaded 1"]
    named = {str(p.relative_to(bundled)) for p in bundled.rglob("*") if p.is_file()}
    # Fewer than are named: the client fetches equal files, such as a shared text encoder, once.
    assert hub.downloaded(pushed) and hub.downloaded(pushed) <= named
    hub.stop()
    offline = run_python(f"import diffusers_fvg\n{CHECKED}\nload({pushed!r})", HF_HUB_OFFLINE="1")
    assert offline == "loaded 1\n"


def test_a_fresh_process_that_does_not(pushed, bundled, run_python):
    """Each source in a process of its own, forked from one that has imported diffusers.

    The Hub's once only: offline, diffusers asks it for the commit of a custom pipeline all the same.
    """
    code = f"""
import os, sys
import diffusers.pipelines.wan, peft
from transformers import LlamaForCausalLM, UMT5EncoderModel
{CHECKED}
for source in ({str(bundled)!r}, {pushed!r}):
    child = os.fork()
    if child == 0:
        assert "diffusers_fvg" not in sys.modules
        load(source, custom_pipeline=source, trust_remote_code=True)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, source
try:
    load({pushed!r}, trust_remote_code=True)
except AttributeError as error:
    print("one of the two forms is needed:", error)
"""
    loaded, again, refused = run_python(code).splitlines()
    assert loaded == again == "loaded 1" and "no attribute FactorizedVideoPipeline" in refused


def test_push_to_hub_makes_a_repository_that_loads(hub, bundled, tmp_path):
    pipe = FactorizedVideoPipeline.from_pretrained(bundled)
    pipe.push_to_hub("org/pushed", token=hub.token)
    loaded = DiffusionPipeline.from_pretrained("org/pushed", cache_dir=tmp_path / "cache")
    assert_same(loaded, pipe)
    assert "pipeline.py" in hub.files("org/pushed")


def test_any_module_can_be_imported_first_or_after_diffusers(run_python):
    """Each in a process of its own, forked from one that has imported what diffusers and the package import of others.

    The first process, in which diffusers comes first, tells what that is.
    """
    code = """
    import contextlib, importlib, os, sys, traceback, torch, peft

    def imports(names):
        for name in names:
            importlib.import_module(name)
        import diffusers, diffusers_fvg
        for name in ("FirstFrameRewriter", "FactorizedVideoPipeline", "AnchorConditionedTransformer3D"):
            assert getattr(diffusers, name) is getattr(diffusers_fvg, name), (names, name)

    modules = "rewrite.rewriter compose.composer animate.transformer_anchor pipelines.pipeline_factorized_video loading.safety"
    read, write = os.pipe()
    for names in (["diffusers"], *(["diffusers_fvg." + module] for module in modules.split())):
        child = os.fork()
        if child == 0:
            try:
                imports(names)
                if names == ["diffusers"]:
                    os.write(write, " ".join(sys.modules).encode())
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if names == ["diffusers"]:
            os.close(write)
            for name in os.fdopen(read).read().split():
                if not name.startswith("diffusers"):
                    with contextlib.suppress(ImportError):
                        importlib.import_module(name)
        assert os.waitpid(child, 0)[1] == 0, names
        assert "diffusers" not in sys.modules
    print("ok")
    """
    assert "ok" in run_python(code)


def test_a_repository_without_the_video_model_says_so(bundled, tmp_path):
    import shutil

    shutil.copytree(bundled, tmp_path / "broken")
    index = json.loads((tmp_path / "broken" / "model_index.json").read_text())
    index["transformer"] = [None, None]
    (tmp_path / "broken" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="transformer"):
        DiffusionPipeline.from_pretrained(tmp_path / "broken")
    shutil.copy(bundled / "model_index.json", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "transformer")
    with pytest.raises(ValueError, match="transformer"):
        DiffusionPipeline.from_pretrained(tmp_path / "broken")
