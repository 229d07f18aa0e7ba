import json
import math
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import tiny_text_encoder
from tiny_judges import tiny_chat_judge, tiny_clip_judge, tiny_siglip_judge
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from diffusers_fvg.compose.judge import AnchorJudge, Judgement
from diffusers_fvg.compose.questions import YES_OR_NO, questions_about
from diffusers_fvg.rewrite.chat_endpoint import ChatEndpoint


CAPTIONS = ["a red circle at the top", "two green leaf and a white ball"]
MAKERS = {"clip": tiny_clip_judge, "siglip": tiny_siglip_judge, "chat": tiny_chat_judge}


def pictures(count: int = 2) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(0)
    return [PIL.Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)) for _ in range(count)]


def scores(judge: AnchorJudge) -> list[float]:
    return [judgement.score for judgement in judge.judge(pictures(), CAPTIONS)]


@pytest.mark.parametrize("make", [tiny_clip_judge, tiny_siglip_judge])
def test_similarity_is_that_of_the_stock_model(make):
    judge = make()
    inputs = judge.processor(
        images=pictures(), text=CAPTIONS, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        made = judge.model(**inputs)
    # Both models give logits that are a scale times the cosine, SigLIP with an offset.
    offset = getattr(judge.model, "logit_bias", 0.0)
    cosines = (made.logits_per_image - offset) / judge.model.logit_scale.exp()
    assert scores(judge) == pytest.approx(cosines.diagonal().tolist(), abs=1e-5)
    assert judge.threshold is None and scores(judge) != pytest.approx(cosines.flip(1).diagonal().tolist(), abs=1e-3)


def test_a_chat_model_s_score_is_its_probability_of_yes():
    judge = tiny_chat_judge()
    (image, _), caption = pictures(), CAPTIONS[0]
    question = YES_OR_NO.format(question=f'Does this figure show "{caption}"?')
    inputs = judge.processor(images=image, text=f"<image>{question}", return_tensors="pt")
    with torch.no_grad():
        logits = judge.model(**inputs).logits[0, -1].double()
    yes, no = (math.exp(logits[judge.processor.tokenizer.convert_tokens_to_ids(word)]) for word in ("yes", "no"))
    (judgement,) = judge.judge([image], [caption])
    assert judgement.score == pytest.approx(yes / (yes + no), abs=1e-5)
    assert judgement.answers == {f'Does this figure show "{caption}"?': judgement.score} and judge.threshold == 0.5


def a_plan() -> SimpleNamespace:
    subject = {"name": "circle", "count": 3, "attributes": ("red",), "state": "", "place": "at the top"}
    return SimpleNamespace(
        subjects=(SimpleNamespace(**subject), SimpleNamespace(**subject | {"name": "cat", "count": 1, "place": ""})),
        relations=("the circle is above the cat.",),
        setting="a garden",
    )


def test_a_plan_is_asked_for_requirement_by_requirement():
    assert questions_about(CAPTIONS[0], a_plan()) == [
        "Does this figure show exactly 3 red circle?",
        "Does this figure show the circle at the top?",
        "Does this figure show red cat?",
        "Does this figure show that the circle is above the cat?",
        'Is "a garden" the setting of this figure?',
    ]
    (judgement,) = tiny_chat_judge().judge(pictures(1), CAPTIONS[:1], [a_plan()])
    assert list(judgement.answers) == questions_about(CAPTIONS[0], a_plan())
    assert judgement.score == pytest.approx(math.prod(judgement.answers.values())) and judgement.score < 0.2


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_saved_judge_is_loaded_in_the_dtype_asked_for(make, tmp_path):
    judge = make()
    judge.save_pretrained(tmp_path / "judge")
    again = AnchorJudge.from_pretrained(tmp_path / "judge")
    assert scores(again) == pytest.approx(scores(judge), abs=1e-5) and again.threshold == judge.threshold
    half = AnchorJudge.from_pretrained(tmp_path / "judge", torch_dtype=torch.bfloat16, threshold=0.25)
    assert half.dtype == torch.bfloat16 and half.threshold == 0.25
    assert scores(half) == pytest.approx(scores(judge), abs=0.05)


def test_a_folder_of_a_model_is_a_judge(tmp_path):
    judge = tiny_clip_judge()
    judge.model.save_pretrained(tmp_path)
    judge.processor.save_pretrained(tmp_path)
    assert scores(AnchorJudge.from_pretrained(tmp_path)) == pytest.approx(scores(judge), abs=1e-5)


def test_a_reference_is_saved_without_weights(tmp_path):
    judge = tiny_clip_judge(threshold=0.3)
    judge.reference = {"model": "org/clip", "revision": "main"}
    judge.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["judge_config.json"]
    written = json.loads((tmp_path / "judge_config.json").read_text())
    assert written == {"model": "org/clip", "revision": "main", "threshold": 0.3}


def test_a_file_names_no_endpoint(tmp_path):
    config = {"endpoint": "https://user:secret@evil.example/v1", "api_key_env": "HF_TOKEN"}
    (tmp_path / "judge_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names an endpoint at 'evil.example'") as error:
        AnchorJudge.from_pretrained(tmp_path)
    assert "secret" not in str(error.value)


def test_a_function_scores_all_pictures_of_a_caption_at_once():
    calls = []

    def function(images, caption, plan):
        calls.append((len(images), caption, plan))
        return np.arange(len(images))

    judge = AnchorJudge(function=function)
    made = judge.judge(pictures(3), ["a", "a", "b"], ["plan", "plan", None])
    assert calls == [(2, "a", "plan"), (1, "b", None)]
    assert made == [Judgement(0.0), Judgement(1.0), Judgement(0.0)]


@pytest.mark.parametrize("found", [[1.0], [1.0, math.nan], [1.0, 2.0, 3.0], None, 1.0, ["good", "bad"], [None, 1.0]])
def test_a_function_gives_a_finite_score_for_each_picture(found):
    with pytest.raises(ValueError, match="finite score"):
        AnchorJudge(function=lambda images, caption, plan: found).judge(pictures(), ["a", "a"])


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"function": len, "endpoint": ChatEndpoint("http://127.0.0.1:1/v1", "m")},
        {"model": torch.nn.Linear(1, 1)},
        {"model": tiny_text_encoder(), "processor": object()},
        {"function": len, "threshold": math.inf},
    ],
    ids=["nothing", "two ways", "no processor", "no vision", "threshold"],
)
def test_what_is_no_judge_is_refused(parts):
    with pytest.raises(ValueError):
        AnchorJudge(**parts)


@pytest.mark.slow
def test_a_judge_of_clip_s_own_size_runs():
    """ViT-B/32, the sizes that transformers' configuration has by default, with random weights."""
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())
    assert 150e6 < sum(parameter.numel() for parameter in model.parameters()) < 152e6
    torch.manual_seed(0)
    tokenizer = tiny_clip_judge().processor.tokenizer
    processor = CLIPProcessor(CLIPImageProcessor(), tokenizer)
    config = CLIPConfig(text_config={"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0})
    judge = AnchorJudge(CLIPModel(config).to(torch.bfloat16).eval(), processor)
    assert all(abs(score) <= 1 for score in scores(judge))
