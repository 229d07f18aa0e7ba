"""Layout of the page of `fvg app`."""

from __future__ import annotations

import html
from types import SimpleNamespace

import gradio as gr

from ..animate.fidelity import ANCHOR_DECODES
from .worker import Worker


def make_layout(worker: Worker) -> SimpleNamespace:
    """Creates the components of the page in the open `gr.Blocks`, and returns them by name."""
    parts, pipe = SimpleNamespace(), worker.pipe
    name = str(pipe.config.get("_name_or_path") or type(pipe).__name__).split("/")[-1]
    parts.key = gr.BrowserState("", storage_key="fvg-session")
    gr.HTML(
        "<h1>Factorized Video Generation</h1><p>Edit the caption of the first frame, choose its picture, then make the "
        f"video. Model: <b>{html.escape(name)}</b></p>",
        elem_id="head",
        padding=False,
    )
    with gr.Group(elem_id="ask"):
        parts.prompt = gr.Textbox(
            label="Prompt", placeholder="A red circle moves to the right", lines=2, max_lines=6, elem_id="prompt"
        )
        choices = [("first frame, then video", "factorized"), ("storyboard", "storyboard"), ("video alone", "direct")]
        parts.mode = gr.Radio(choices, value="factorized", label="Mode", elem_id="mode")
    with gr.Row(elem_id="do"):
        parts.generate = gr.Button("Make the video", variant="primary", scale=3, min_width=160, elem_id="generate")
        parts.cancel = gr.Button("Cancel", scale=1, min_width=100, elem_id="cancel")
    parts.status = gr.HTML(elem_id="status", padding=False)
    with gr.Row(elem_id="stages", equal_height=False):
        _caption_panel(parts)
        _picture_panel(parts, worker)
        _video_panel(parts)
    _settings(parts, worker)
    with gr.Accordion("History of this session", open=True, elem_id="past"):
        parts.history = gr.Gallery(
            show_label=False,
            columns=6,
            height="auto",
            fit_columns=False,
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="history",
        )
    return parts


def _title(number: int, name: str, does: str) -> None:
    gr.HTML(f"<h2><span>{number}</span>{name}</h2><p>{does}</p>", elem_classes="title", padding=False)


def _caption_panel(parts: SimpleNamespace) -> None:
    with gr.Column(min_width=300, elem_classes="stage-card"):
        _title(1, "Words", "The caption of the first frame.")
        parts.caption = gr.Textbox(
            label="First frame (edit it)",
            lines=9,
            max_lines=14,
            placeholder="Written from the prompt, or by you. A storyboard has one line per moment: 50% A red circle",
            elem_id="caption",
        )
        gr.HTML("<p>This stage is deterministic and has no seed.</p>", elem_classes="note", padding=False)
        parts.rewrite = gr.Button("Write it", elem_id="rewrite")


def _picture_panel(parts: SimpleNamespace, worker: Worker) -> None:
    with gr.Column(min_width=300, elem_classes="stage-card"):
        _title(2, "Picture", "Choose the picture to animate.")
        parts.pictures = gr.Gallery(
            show_label=False,
            columns=2,
            height="auto",
            fit_columns=False,
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="pictures",
        )
        parts.judged = gr.HTML(elem_id="judged", padding=False)
        with gr.Row():
            parts.anchor_seed = gr.Number(label="Seed", precision=0, min_width=110, elem_id="anchor-seed")
            parts.anchor_dice = gr.Button("New", min_width=64, scale=0, elem_classes="dice")
        parts.num_candidates = gr.Slider(
            1, worker.limits.pictures, 4, step=1, label="Number of pictures", buttons=[], elem_id="num-candidates"
        )
        parts.compose = gr.Button("Draw it", elem_id="compose")
        with gr.Accordion("Your own pictures", open=False, elem_id="own"):
            with gr.Row():
                parts.frame = gr.Number(0, label="Frame (−1: last)", precision=0, min_width=110, elem_id="frame")
                parts.strength = gr.Slider(0.05, 1, 1, step=0.05, label="Strength", min_width=110)
            parts.upload = gr.File(show_label=False, file_count="single", height=136, elem_id="upload")
            parts.anchors = gr.Gallery(
                show_label=False,
                buttons=[],
                columns=3,
                height="auto",
                allow_preview=False,
                interactive=False,
                elem_id="anchors",
            )
            parts.clear = gr.Button("Remove all", size="sm")


def _video_panel(parts: SimpleNamespace) -> None:
    with gr.Column(min_width=300, elem_classes="stage-card"):
        _title(3, "Video", "The video that starts with the picture.")
        parts.preview = gr.HTML(elem_id="preview", padding=False)
        parts.video = gr.HTML(elem_id="video", padding=False)
        parts.downloads = gr.HTML(elem_id="downloads", padding=False)
        parts.memory = gr.HTML(elem_id="memory", elem_classes="note", padding=False)
        with gr.Row():
            parts.seed = gr.Number(label="Seed", precision=0, min_width=110, elem_id="seed")
            parts.dice = gr.Button("New", min_width=64, scale=0, elem_classes="dice", elem_id="dice")
        parts.animate = gr.Button("Animate it", elem_id="animate")
        with gr.Accordion("Recipe of a video", open=False):
            parts.recipe = gr.File(label="Drop an mp4 made by fvg", file_types=[".mp4"], height=136, elem_id="recipe")


def _settings(parts: SimpleNamespace, worker: Worker) -> None:
    # The fields have no bounds: gradio would only show "Error" everywhere, while the checks of an order explain what is wrong.
    own, limits = worker.pipe.call_defaults, worker.limits
    step = worker.pipe._frame_step()
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        with gr.Row():
            parts.width = gr.Number(own["width"], label="Width", precision=0, min_width=110, elem_id="width")
            parts.height = gr.Number(own["height"], label="Height", precision=0, min_width=110, elem_id="height")
            parts.num_frames = gr.Number(
                own["num_frames"],
                label=f"Frames (up to {limits.frames})",
                precision=0,
                step=step,
                min_width=110,
                elem_id="frames",
            )
        with gr.Row():
            presets = [("the model's own", ""), *((name, name) for name in worker.pipe.presets)]
            parts.preset = gr.Dropdown(presets, value="", label="Preset", min_width=160)
            parts.num_inference_steps = gr.Number(
                label="Steps (empty: the preset's)", precision=0, min_width=160, elem_id="steps"
            )
            parts.guidance_scale = gr.Number(label="Guidance (empty: the preset's)", step=0.5, min_width=160)
        with gr.Row():
            parts.lora_scale = gr.Number(1, label="Strength of the anchor LoRA", step=0.05, min_width=160)
            parts.anchor_decode = gr.Dropdown(
                list(ANCHOR_DECODES), value="raw", label="Anchor's colours", min_width=160
            )
            parts.num_moments = gr.Number(2, label="Moments of a storyboard", precision=0, min_width=160)
        parts.negative_prompt = gr.Textbox(label="Negative prompt (empty: the model's own)")
