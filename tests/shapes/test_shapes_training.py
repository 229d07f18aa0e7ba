"""The shapes model's training: loop, resuming, target scores, and the text encoder's task."""

import json

import numpy as np
import pytest
import torch

from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.lora.anchor_lora import AnchorLora
from diffusers_fvg.shapes import train as shapes_train
from diffusers_fvg.shapes.loop import train, trained
from diffusers_fvg.shapes.tokenizer import text_tokenizer
from diffusers_fvg.shapes.train import Part, train_all
from diffusers_fvg.shapes.train_models import MAX_SEQUENCE_LENGTH, phrase_targets, tokenize
from diffusers_fvg.shapes.train_vae import sample_clips
from diffusers_fvg.shapes.world import BACKGROUND


def run(folder, steps, stop_at=None, decay=0.0):
    """Fits a line to noisy points by gradient descent; `stop_at` raises in that step, as a kill would."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss_of(step):
        if step == stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(8, 3)
        return "point", (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()

    folder.mkdir(exist_ok=True)
    options = {"peak": 0.05, "decay": decay, "warmup": 5, "log_every": 5, "save_every": 10}
    train(folder, "line", steps, {"model": model}, lambda: [torch.optim.AdamW(model.parameters())], loss_of, **options)
    return model.weight.detach()


def test_a_stopped_run_ends_like_one_that_was_not(tmp_path):
    whole = run(tmp_path / "whole", 40, decay=0.9)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 40, stop_at=27, decay=0.9)
    assert torch.equal(run(tmp_path / "stopped", 40, decay=0.9), whole)
    for key in ("step", "loss_point"):
        logs = [(tmp_path / name / "line_log.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
        whole, stopped = ([json.loads(line)[key] for line in log] for log in logs)
        assert stopped == whole and len(whole) == 8


def test_the_average_is_what_remains(tmp_path):
    # A decay of 0 keeps the last weights: closer to the solution (1, 1, 1) than an average that holds the first steps.
    last, average = (run(tmp_path / str(decay), 60, decay=decay) for decay in (0.0, 0.99))
    assert (last - 1).abs().max() < (average - 1).abs().max()


def test_the_log_gives_time_and_curve(tmp_path):
    run(tmp_path / "a", 40)
    facts = trained(tmp_path / "a", "line", points=4)
    assert facts["steps"] == 40
    assert [step for step, _ in facts["loss_point"]] == [10, 20, 30, 40]
    losses = [loss for _, loss in facts["loss_point"]]
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture
def parts(monkeypatch):
    """Two parts that note that they ran; the second's score can be changed."""
    ran, scores = [], {"first": 0.9, "second": 0.4}
    made = {
        name: Part(
            lambda folder, name=name: ran.append(name) or {"samples": 3}, lambda folder, name=name: scores[name], 0.5
        )
        for name in scores
    }
    monkeypatch.setattr(shapes_train, "PARTS", made)
    monkeypatch.setattr(shapes_train, "assemble", lambda folder, output: ran.append("assemble"))
    return ran, scores


def test_a_part_below_its_bar_stops_the_training(parts, tmp_path):
    ran, scores = parts
    with pytest.raises(ValueError, match="second scored 0.4, below its target of 0.5"):
        train_all(tmp_path, ("first", "second"))
    assert json.loads((tmp_path / "training.json").read_text()) == {
        "first": {"samples": 3, "held_out": 0.9, "bar": 0.5}
    }
    scores["second"] = 0.6
    train_all(tmp_path, ("first", "second"))
    assert ran == ["first", "second", "second", "assemble"]


def test_every_word_learns_its_phrase():
    tokenizer = text_tokenizer()
    words = tokenizer.get_vocab()
    tokens = tokenize(tokenizer, ["A red circle moves upwards while a blue square moves downwards"])
    together, phrase = phrase_targets(tokens, words)
    assert together.shape == (1, MAX_SEQUENCE_LENGTH, len(words))
    names = {index: word for word, index in words.items()}
    read = [{names[k] for k in row.nonzero().flatten().tolist()} for row in together[0]]
    assert read[0] == read[4] == {"a", "red", "circle", "moves", "upwards"}
    assert read[5] == {"while"}
    assert read[6] == read[10] == {"a", "blue", "square", "moves", "downwards"}
    assert phrase[0, [0, 4, 5, 6, 10]].tolist() == [1, 1, 2, 3, 3]


def test_the_embedded_lora_was_trained_with_these_options():
    recorded = json.loads(AnchorLora.from_pretrained(EMBEDDED_FOLDER / "anchor_lora").metadata["training_config"])
    settings = json.loads(json.dumps(shapes_train.LORA_SETTINGS))
    assert {name: recorded[name] for name in settings} == settings


def test_clips_for_the_vae_are_pixels_between_minus_one_and_one():
    clips = sample_clips(np.random.default_rng(0), 3, 5)
    assert clips.shape == (3, 3, 5, 64, 64) and -1 <= clips.min() < -0.5 and 0.5 < clips.max() <= 1
    grey = torch.tensor(BACKGROUND).view(1, 3, 1, 1, 1) / 127.5 - 1
    assert ((clips - grey).abs() < 1e-6).float().mean() > 0.5
