"""Model cards: the committed ones are up to date, and every kind says what its folder or its run says."""

import inspect
import json
import re
import runpy
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanPipeline
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from tiny import tiny_composer, tiny_pipeline, tiny_transformer, tiny_wan_components

from diffusers_fvg import FactorizedVideoPipeline, assemble
from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME, AnchorLora
from diffusers_fvg.models import License
from diffusers_fvg.publishing.card_sections import Scores, license_of, shapes_report, training_parts_table
from diffusers_fvg.publishing.cards import repository_card, training_card
from diffusers_fvg.training.config import TrainConfig


ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "model_cards"
CARDS, render, write_cards = map(runpy.run_path(str(COMMITTED / "render.py")).get, ("CARDS", "render", "write_cards"))
BASE = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
RUN = {
    "model": BASE,
    "data": "org/clips",
    "cache_dir": "/home/somebody/cache",
    "output_dir": "/home/somebody/run",
    "buckets": [[121, 704, 1280]],
    "frame_rate": 24,
}
# Of https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
SHAPES = "Shapes world, held-out prompts of seven categories"
WITHOUT_WEIGHTS = [name for name in CARDS if name != "shapes"]


def check_metadata(card: ModelCard) -> dict:
    """The YAML block survives a round trip and keeps the Hub's rules; returns it."""
    block = re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL).group(1)
    content = yaml.safe_load(block)
    assert ModelCardData(**yaml.safe_load(block)).to_dict() == content == ModelCard(str(card)).data.to_dict()
    assert content["pipeline_tag"] == "text-to-video" and content["library_name"] == "diffusers"
    assert all(isinstance(tag, str) and len(tag) < 50 for tag in content["tags"])
    for repository in content.get("base_model", []):
        validate_repo_id(repository)
    if "base_model_relation" in content:
        assert content["base_model_relation"] in RELATIONS and content["base_model"]
    if "license_name" in content:
        assert content["license"] == "other" and re.fullmatch(r"[a-z0-9.-]+", content["license_name"])
    assert re.match(r"https://|$", content.get("license_link", ""))
    assert content["widget"] and all(list(example) == ["text"] for example in content["widget"])
    return content


def section(card: ModelCard, head: str) -> str:
    return re.search(rf"^## {head}\n\n(.*?)(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL).group(1).strip()


def cells(table: str) -> list[list[str]]:
    """Rows of the first markdown table in a text, without its heads."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def lora(prefixes: tuple[str, ...] = ("transformer",)) -> dict[str, torch.Tensor]:
    config = tiny_transformer().config
    width = config.num_attention_heads * config.attention_head_dim
    shapes = {"lora_A": (2, width), "lora_B": (width, 2)}
    return {f"{p}.blocks.0.attn1.to_q.{k}.weight": torch.randn(shape) for p in prefixes for k, shape in shapes.items()}


# -- committed cards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARDS)
def test_a_committed_card_is_what_the_data_say(name):
    committed = (COMMITTED / f"{name}.md").read_text(encoding="utf-8")
    assert committed == str(render(name)), "write it again: python model_cards/render.py"
    check_metadata(ModelCard(committed))


def test_no_card_is_left_over_and_all_are_written(tmp_path):
    assert sorted(path.name for path in write_cards(tmp_path)) == sorted(path.name for path in COMMITTED.glob("*.md"))


@pytest.mark.parametrize("name", CARDS)
def test_every_card_cites_both_papers(name):
    assert re.findall(r"eprint +\= \{(.*)\}", section(render(name), "Citation")) == ["2512.16371", "2408.10119"]


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_a_card_without_weights_says_so(name):
    card = render(name)
    assert "This project has not trained or published weights" in section(card, "Status")
    assert section(card, "Hardware and memory").startswith("Nothing was measured on this model's weights.")
    assert section(card, "Scores") == "None." and "model-index" not in card.data.to_dict()


def test_a_status_names_a_class_only_as_far_as_it_exists():
    assert "contains its class `AnchorConditionedTransformer3D`" in section(render("wan2.1-t2v-1.3b"), "Status")


def test_licences_on_the_cards():
    assert render("wan2.2-t2v-a14b").data.license == "apache-2.0"
    data = check_metadata(render("cogvideox1.5-5b"))
    assert (data["license"], data["license_name"]) == ("other", "cogvideox-license")


def test_shapes_card_has_the_report_s_scores_and_calls_them_synthetic():
    card, report = render("shapes"), shapes_report(ROOT / "examples" / "results" / "shapes")
    means = {arm: f"{mean:.3f}" for arm, mean in report.scores.means.items()}
    assert {row[0]: row[1] for row in cells(section(card, "Scores"))} == means
    assert "**Synthetic**" in section(card, "Scores")
    results = card.data.to_dict()["model-index"][0]["results"]
    assert all(result["dataset"]["type"] == "synthetic" for result in results)
    assert [float(value) for value in means.values()] == [m["value"] for r in results for m in r["metrics"]]


def test_unknown_card():
    with pytest.raises(ValueError, match="`name='wan'` is not a card; use one of shapes, "):
        render("wan")


def test_scores_come_from_the_study(tmp_path):
    rows = [
        {"arm": "direct", "steps": 50, "videos": 63, "score": 0.5, "seconds": 2.0},
        {"arm": "factorized", "steps": 15, "videos": 189, "score": 0.875, "seconds": 0.5},
    ]
    made = {"commit": "c" * 40, "changed": True, "device": "cpu (x86_64)"}
    training = {"vae": {"parameters": 1234567, "steps": 400, "held_out": 0.96, "loss_a": [[1, 2.0]]}}
    study = {"synthetic": True, "made_with": made, "results": rows, "training": training}
    (tmp_path / "study.json").write_text(json.dumps(study))
    report = shapes_report(tmp_path)
    means = {"direct, 50 steps": 0.5, "factorized, 15 steps": 0.875}
    assert report.scores == Scores(SHAPES, True, "c" * 40 + "-dirty", 63, means)
    assert report.seconds["direct, 50 steps"] == 2.0 and report.device == "cpu (x86_64)"
    assert cells(training_parts_table(report.training)) == [["vae", "1,234,567", "", "400", "", "0.96"]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apache-2.0", License("apache-2.0")),
        ("CogVideoX License", License("other", "cogvideox-license")),
        ("not stated", None),
        ("", None),
    ],
)
def test_license_of(name, expected):
    assert license_of(name) == expected


# -- repositories -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards") / "tiny"
    metadata = {"training_config": json.dumps(RUN | {"rank": 2}), "base_model": BASE}
    tiny_pipeline(anchor_lora=AnchorLora(lora(), metadata)).save_pretrained(folder)
    return folder


@pytest.fixture
def bundled(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def light(folder: Path) -> Path:
    """Leaves of a bundled repository what a light one holds."""
    for path in folder.rglob("*.safetensors"):
        if "anchor_lora" not in path.parts:
            path.unlink()
    rewriter = {"model": "org/chat", "revision": "c" * 40, "examples": False}
    (folder / "rewriter" / "rewriter_config.json").write_text(json.dumps(rewriter))
    composer = {"repository": "org/painter", "revision": "b" * 40, "call_defaults": {}, "batch_size": 1}
    (folder / "composer" / "composer_config.json").write_text(json.dumps(composer))
    reference = {"repository": BASE, "revision": "a" * 40, "library": "diffusers", "class": "AutoencoderKLWan"}
    (folder / "vae" / "reference.json").write_text(json.dumps(reference))
    parts = {
        "transformer": {"repository": BASE, "revision": "a" * 40, "license": "apache-2.0", "bytes": 3_000_000},
        "composer": {"repository": "org/painter", "revision": "b" * 40, "license": "mit", "bytes": 4_500_000},
    }
    (folder / "parts.json").write_text(json.dumps(parts))
    return folder


def test_bundled_repository(bundled):
    card = repository_card(bundled, "org/fvg")
    data = check_metadata(card)
    rows = {row[1]: row for row in cells(section(card, "Parts and licences"))}
    assert set(rows) == {"rewriter", "composer", "text_encoder", "transformer", "vae", "anchor_lora"}
    assert rows["rewriter"][0] == "1 reasoning" and rows["composer"][0] == "2 composition"
    size = sum(path.stat().st_size for path in bundled.rglob("*.safetensors")) / 1e6
    assert f"Weights in this repository: {size:,.1f} MB." in section(card, "Hardware and memory")
    assert 'from_pretrained("org/fvg"' in section(card, "Use") and card.text.startswith("\n# org/fvg\n")
    assert [row[:2] for row in cells(section(card, "Presets"))] == [["`anchored-15`", "15"], ["`full-50`", "50"]]
    # Where the weights come from only the LoRA says, and it says no licence.
    assert data["base_model"] == [BASE] and data["base_model_relation"] == "adapter" and "license" not in data
    assert "Wan2.2-TI2V-5B was trained at 704 x 1280" in section(card, "Limits")


def test_training_config_of_the_lora_s_file(bundled):
    text = section(repository_card(bundled), "Training")
    assert "has rank 2" in text
    shown = {name: value for name, value in RUN.items() if name not in ("cache_dir", "output_dir")}
    assert tomllib.loads(code_blocks(text, "toml")[0]) == shown | {"rank": 2}


def test_light_repository(bundled):
    card = repository_card(light(bundled))
    data = check_metadata(card)
    rows = {row[1]: row for row in cells(section(card, "Parts and licences"))}
    assert set(rows) == {"rewriter", "composer", "transformer", "vae", "anchor_lora"}
    for name in ("transformer", "vae"):
        assert "a" * 40 in rows[name][2] and f"huggingface.co/{BASE}" in rows[name][2]
        assert rows[name][3:] == ["", "apache-2.0"]
    assert "Downloaded at the first loading: 7.5 MB." in section(card, "Hardware and memory")
    assert "b" * 40 in rows["composer"][2] and rows["composer"][4] == "mit"
    assert "c" * 40 in rows["rewriter"][2] and rows["rewriter"][3:] == ["", "not stated"]
    assert data["base_model"] == ["org/painter", "org/chat", BASE] and "license" not in data


def test_an_endpoint_s_address_and_key_stay_off_the_card(bundled):
    rewriter = {"endpoint": "https://user:secret@host/v1", "model": "chat", "api_key_env": "MY_KEY"}
    (light(bundled) / "rewriter" / "rewriter_config.json").write_text(json.dumps(rewriter))
    assert not re.search("secret|MY_KEY|host/v1", str(repository_card(bundled)))


# What a stranger writes into the files that a card is made of.
INJECTED = "[click](https://evil.example) ![p](https://evil.example/p.png) <script>a()</script>\n\n# Heading\n```\nend `code` | cell"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_texts_of_files_stay_texts(bundled):
    """Of a preset, a part, scores, defaults, a class and the LoRA's training config: no link, picture, HTML, heading or fence."""
    plain = repository_card(bundled, "org/fvg")
    preset = bundled / "schedulers" / "full-50" / "scheduler_config.json"
    edit_json(preset, _preset=json.loads(preset.read_text())["_preset"] | {"source": INJECTED, "weights": INJECTED})
    edit_json(bundled / "model_index.json", _class_name=INJECTED, call_defaults={"height": INJECTED})
    part = {"origin": INJECTED, "revision": INJECTED, "license": INJECTED, "repository": INJECTED}
    (bundled / "parts.json").write_text(json.dumps({"vae": part, INJECTED: part}))
    scores = {"benchmark": INJECTED, "synthetic": True, "commit": INJECTED, "count": 1, "means": {INJECTED: 0.5}}
    (bundled / "scores.json").write_text(json.dumps(scores))
    config = json.dumps(RUN | {INJECTED: INJECTED})
    AnchorLora(lora(), {"training_config": config, "base_model": INJECTED}).save_pretrained(bundled / "anchor_lora")
    card = repository_card(bundled, "org/fvg")
    check_metadata(card)
    read = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").parse
    shown, expected = (_kinds(read(text)) for text in (card.text, plain.text))
    assert {kind: shown[kind] for kind in ("heading_open", "fence")} == {
        kind: expected[kind] for kind in ("heading_open", "fence")
    }
    assert shown["html_block"] == shown["html_inline"] == shown["image"] == 0
    (toml,) = [token.content for token in read(card.text) if token.type == "fence" and token.info == "toml"]
    assert tomllib.loads(toml)[INJECTED] == INJECTED
    links = {
        child.attrs["href"] for token in read(card.text) for child in token.children or () if child.type == "link_open"
    }
    assert links and not any("evil" in link for link in links)
    rows = [row for row in read(card.text) if row.type == "inline" and "click" in row.content]
    assert len(rows) >= 6


def _kinds(tokens) -> Counter:
    return Counter(each.type for token in tokens for each in (token, *(token.children or ())))


@pytest.mark.parametrize("config", ["{", "[1]", '{"a":' * 20_000 + "1" + "}" * 20_000, '{"data": [1]}'], ids=len)
def test_a_training_config_that_is_none_is_told(bundled, config):
    AnchorLora(lora(), {"training_config": config}).save_pretrained(bundled / "anchor_lora")
    with pytest.raises(ValueError, match="`training_config` of the anchor LoRA is not valid"):
        repository_card(bundled)


def test_machine_s_paths_stay_off_the_card(bundled):
    assert "somebody" not in str(repository_card(bundled)) and str(bundled.parent) not in str(repository_card(bundled))


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (["apache-2.0", "apache-2.0", "apache-2.0"], ("apache-2.0", None)),
        (["apache-2.0", "mit", "mit"], ("other", "licences-of-the-parts")),
        (["apache-2.0", "mit", ""], (None, None)),
    ],
)
def test_licence_of_the_whole(bundled, licenses, expected):
    names = ("rewriter", "composer", "anchor_lora")
    parts = {name: {"repository": f"org/{name}", "license": license} for name, license in zip(names, licenses)}
    light(bundled)
    (bundled / "parts.json").write_text(json.dumps(parts))
    data = check_metadata(repository_card(bundled))
    assert (data.get("license"), data.get("license_name")) == expected


def test_repository_that_was_assembled(tmp_path):
    WanPipeline(**tiny_wan_components()).save_pretrained(tmp_path / "base")
    tiny_composer().pipeline.save_pretrained(tmp_path / "painter")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (tmp_path / "painter" / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-license\n---\n# T2I\n")
    assemble(tmp_path / "whole", str(tmp_path / "base"), composer=str(tmp_path / "painter"), light=False)
    card = repository_card(tmp_path / "whole")
    rows = {row[1]: row for row in cells(section(card, "Parts and licences"))}
    assert {name: row[4] for name, row in rows.items()} == {
        "text_encoder": "apache-2.0",
        "transformer": "apache-2.0",
        "vae": "apache-2.0",
        "composer": "tiny-license",
    }
    data = check_metadata(card)
    assert data["license_name"] == "licences-of-the-parts" and "base_model" not in data
    assert section(card, "Training") == "There is no anchor LoRA."


def test_scores_of_a_repository(bundled):
    scores = {"benchmark": "Some prompts", "synthetic": False, "commit": "c" * 40, "count": 7, "means": {"a": 0.25}}
    (bundled / "scores.json").write_text(json.dumps(scores))
    card = repository_card(bundled)
    text = section(card, "Scores")
    assert cells(text) == [["a", "0.250", "7"]] and f"commit `{'c' * 40}`" in text and "Synthetic" not in text
    assert check_metadata(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    (bundled / "scores.json").write_text(json.dumps({"mean": 1}))
    with pytest.raises(ValueError, match=r"has the fields \['mean'\]; it needs"):
        repository_card(bundled)


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json"):
        repository_card(tmp_path)


def test_saved_card_is_read_by_the_hub_s_client(bundled):
    card = repository_card(bundled)
    card.save(bundled / "README.md")
    assert metadata_load(bundled / "README.md") == card.data.to_dict()
    assert str(ModelCard.load(bundled / "README.md")) == str(card)


# -- training runs ----------------------------------------------------------------------------------------------------


def log(losses: list[float]) -> list[dict]:
    return [
        {"step": step, "loss": loss, "gradient_norm": 1.0, "seconds": 9.0, "bytes": 2**30 * min(step, 5)}
        for step, loss in enumerate(losses, 1)
    ]


def test_training_card():
    config = TrainConfig(**RUN)
    # 400 steps of 9 seconds are an hour; the first and last tenth are 40 steps each.
    card = training_card(config, {"transformer": log([0.5, 0.7] * 20 + [9.0] * 320 + [0.1, 0.2] * 20)})
    data = check_metadata(card)
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ([BASE], "adapter", "apache-2.0")
    assert "lora" in data["tags"] and data["datasets"] == ["org/clips"]
    assert cells(section(card, "Run")) == [["transformer", "400", "0.6000", "0.1500", "1.00", "5.0 GiB"]]
    shown = tomllib.loads(code_blocks(section(card, "Training config"), "toml")[0])
    whole = tomllib.loads(config.to_toml())
    assert shown == {name: value for name, value in whole.items() if name not in ("cache_dir", "output_dir")}


def test_training_card_of_local_folders_names_no_path(tmp_path):
    for name in ("base", "clips"):
        (tmp_path / "home" / name).mkdir(parents=True)
    places = {name: str(tmp_path / "home" / folder) for name, folder in (("model", "base"), ("data", "clips"))}
    card = training_card(TrainConfig(**RUN | places), {"transformer": log([1.0])})
    data = check_metadata(card)
    assert not {"base_model", "base_model_relation", "datasets", "license"} & set(data)
    assert str(tmp_path) not in str(card) and "somebody" not in str(card)
    shown = tomllib.loads(code_blocks(section(card, "Training config"), "toml")[0])
    assert (shown["model"], shown["data"]) == ("base", "clips")


def test_a_relative_folder_is_no_repository_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/base").mkdir(parents=True)
    card = training_card(TrainConfig(**RUN | {"model": "models/base"}), {"transformer": log([1.0])})
    assert "base_model" not in check_metadata(card)


def test_training_card_needs_a_log_of_each_expert():
    config = TrainConfig(**RUN | {"experts": ["transformer", "transformer_2"]})
    with pytest.raises(ValueError, match=r"no records of \['transformer_2'\]"):
        training_card(config, {"transformer": log([1.0]), "transformer_2": []})


@pytest.mark.parametrize("experts", [("transformer",), ("transformer_2",), ("transformer", "transformer_2")])
def test_code_of_a_training_card_loads_the_lora(tmp_path, experts):
    second = {"transformer_2": tiny_transformer(seed=1), "boundary_ratio": 0.875} if "transformer_2" in experts else {}
    WanPipeline(**tiny_wan_components(), **second).save_pretrained(tmp_path / "base")
    # The files that a run writes.
    (tmp_path / "lora").mkdir()
    save_file(lora(experts), tmp_path / "lora" / Path(WEIGHT_NAME).name)
    if second:
        save_file(lora(), tmp_path / "lora" / "transformer_2.safetensors")
    card = training_card(TrainConfig(**RUN | {"experts": experts}), {name: log([1.0]) for name in experts})
    ours, stock = code_blocks(section(card, "Use"), "python")
    call = re.search(r"pipe\.animate\((.*)\)\n", ours).group()
    for code in (ours.replace(f"frames = {call}", ""), stock):
        code = code.replace(BASE, str(tmp_path / "base")).replace("<this repository>", str(tmp_path / "lora"))
        space: dict = {}
        exec(code, space)
        for expert in experts:
            names = [name for name, _ in getattr(space["pipe"], expert).named_parameters()]
            assert any("blocks.0.attn1.to_q.lora_B" in name for name in names), (expert, code)
    signature = inspect.signature(FactorizedVideoPipeline.animate)
    assert eval(f"f({call[13:-2]})", {"f": lambda *a, **k: signature.bind(None, *a, **k), "image": None})


def test_cards_are_light_to_import(run_python):
    code = """
    import sys, diffusers_fvg.publishing.cards
    print([name for name in ("torch", "diffusers", "transformers", "numpy") if name in sys.modules])
    """
    assert run_python(code, new_interpreter=True).strip() == "[]"
