"""Training with the attention window that sampling uses."""

from pathlib import Path

import pytest
from tiny import tiny_transformer
from training_runs import (
    distilled_config,
    losses,
    save_cogvideox_model,
    save_config,
    save_lora,
    save_model,
    save_videos,
    tiny_config,
)

from diffusers_fvg import AnchorLora
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.training.trainer import main_train


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("window")
    return save_model(root / "model"), save_videos(root / "data", 1)


def run(config) -> None:
    main_train(save_config(config, Path(config.output_dir) / "run.toml"))


@pytest.fixture
def windows(monkeypatch):
    """The window of every forward."""
    seen, forward = [], AnchorConditionedTransformer3D.forward

    def recorded(self, *args, **kwargs):
        seen.append(self.anchor_window)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(AnchorConditionedTransformer3D, "forward", recorded)
    return seen


def trained(places, output: Path, **options) -> list[float]:
    run(tiny_config(*places, output, steps=3, anchor_position="first", **options))
    return [loss for _, loss in losses(output)]


def test_the_window_is_trained_under_and_written_down(places, tmp_path, windows):
    dense = trained(places, tmp_path / "dense")
    assert set(windows) == {None}
    assert "anchor_window" not in AnchorLora.from_pretrained(tmp_path / "dense").metadata
    # Three latent frames: two away is all of them.
    wide = trained(places, tmp_path / "wide", anchor_window=2)
    assert wide == pytest.approx(dense, rel=1e-4)
    windows.clear()
    narrow = trained(places, tmp_path / "narrow", anchor_window=0)
    assert set(windows) == {0}
    assert abs(narrow[0] - dense[0]) > 1e-5 * dense[0]
    assert AnchorLora.from_pretrained(tmp_path / "narrow").metadata["anchor_window"] == "0"


def test_teacher_and_student_have_their_own_windows(places, tmp_path, windows):
    """The teacher's is that of its LoRA."""
    for name, metadata, own in (("dense", None, None), ("narrow", {"anchor_window": "0"}, 0)):
        lora = save_lora(tmp_path / name, {"transformer": tiny_transformer()}, metadata=metadata)
        windows.clear()
        run(distilled_config(places, tmp_path / f"of {name}", lora, steps=3, anchor_window=1))
        assert windows == [own, own, 1] * 3


def test_cogvideox_has_no_window(tmp_path):
    places = save_cogvideox_model(tmp_path / "model"), save_videos(tmp_path / "data", 1)
    with pytest.raises(
        ValueError, match="`anchor_window=1`, but AnchorConditionedCogVideoX.* has no window attention"
    ):
        run(tiny_config(*places, tmp_path / "out", anchor_window=1, targets=["to_q"]))
    assert not (tmp_path / "data" / "cache").exists()
