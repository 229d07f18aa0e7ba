"""Trains the shapes world's rewriter from scratch: a Llama of 0.7 M parameters that answers in JSON like a large model.

It learns pairs of prompt and answer for three tasks: captions of the first frame, storyboards of two or three moments, and
motion captions. Half of the prompts are reworded. If a prompt leaves a place open, the training answers differ, and greedy
decoding takes the likeliest. Objects that are only counted have a fixed layout for each number, which makes their number easier
to learn. The target is a `held_out_score` of at least 0.95 in each task.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..rewrite.chats import build_messages
from ..rewrite.rewriter import FirstFrameRewriter
from ..rewrite.tasks import FIRST_FRAME, MOTION, RewriterTask, storyboard_task
from .held_out import held_out_scenes, score_written_caption, score_written_motion, score_written_storyboard
from .loop import train, training_device
from .prompts import CATEGORIES, make_scene, motion_caption, planned_caption, storyboard
from .world import Scene


LLAMA_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
# Counting has a larger share: its answers are the longest, and it takes the longest to learn.
CATEGORY_SHARES = dict.fromkeys((*CATEGORIES, "placement"), 0.1) | {"generative_numeracy": 0.3}
IGNORED = -100
# The tasks, their shares of the training pairs, and the instructions that select them.
TASKS = (FIRST_FRAME, storyboard_task(2), storyboard_task(3), MOTION)
TASK_SHARES = (0.5, 0.2, 0.15, 0.15)
INSTRUCTIONS = {"first_frame": "", "storyboard": "<|storyboard|>{num_moments}", "motion": "<|motion|>"}


def true_answer(task: RewriterTask, scene: Scene) -> str:
    """Returns the right answer of the rewriter to a task about a scene's prompt."""
    scene = replace(scene, caption=planned_caption(scene))
    made = {
        "first_frame": lambda: scene.caption,
        "storyboard": lambda: storyboard(scene, task.captions),
        "motion": lambda: motion_caption(scene),
    }
    return task.write(made[task.name]())


def training_pair(tokenizer, rng: np.random.Generator) -> tuple[list[int], int]:
    """Draws a training pair, never with a held-out prompt: token ids of a chat with its answer, and the answer's start index."""
    from .tokenizer import loose_wording

    task = rng.choice(TASKS, p=TASK_SHARES)
    scene = make_scene(str(rng.choice(list(CATEGORY_SHARES), p=list(CATEGORY_SHARES.values()))), rng, held_out=False)
    prompt = loose_wording(scene.prompt, rng) if rng.random() < 0.5 else scene.prompt
    instruction = INSTRUCTIONS[task.name].replace("{num_moments}", str(task.captions))
    chat = tokenizer.apply_chat_template(
        build_messages(prompt, instruction, examples=()), tokenize=False, add_generation_prompt=True
    )
    question = tokenizer(chat, add_special_tokens=False).input_ids
    answer = tokenizer(true_answer(task, scene), add_special_tokens=False).input_ids
    return question + answer + [tokenizer.eos_token_id], len(question)


def training_batch(tokenizer, rng: np.random.Generator, batch_size: int) -> dict[str, torch.Tensor]:
    """Draws a batch: `input_ids`, `attention_mask` and `labels` `(B, L)`. Only the answers have labels."""
    pairs = [training_pair(tokenizer, rng) for _ in range(batch_size)]
    length = max(len(ids) for ids, _ in pairs)
    input_ids = torch.full((batch_size, length), tokenizer.pad_token_id)
    labels = torch.full((batch_size, length), IGNORED)
    for row, (ids, begin) in enumerate(pairs):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, begin : len(ids)] = torch.tensor(ids[begin:])
    return {"input_ids": input_ids, "attention_mask": (input_ids != tokenizer.pad_token_id).long(), "labels": labels}


def held_out_score(
    rewriter, per_category: int = 25, seed: int = 0, task: RewriterTask = FIRST_FRAME
) -> dict[str, float]:
    """Returns the mean score of the answers to a task per category, on held-out prompts; places left open do not count."""
    scenes = held_out_scenes(per_category, seed)
    prompts = [scene.prompt for scene in scenes]
    if task.name == "first_frame":
        found = map(score_written_caption, rewriter.rewrite(prompts), scenes)
    elif task.name == "motion":
        found = map(score_written_motion, rewriter.describe_motion(prompts), scenes)
    else:
        made = rewriter.storyboard(prompts, task.captions)
        found = (score_written_storyboard(moments, scene, task.captions) for moments, scene in zip(made, scenes))
    scores: dict[str, list[float]] = {}
    for scene, score in zip(scenes, found):
        scores.setdefault(scene.category, []).append(score)
    return {category: float(np.mean(values)) for category, values in scores.items()}


def train_rewriter(
    folder: Path, steps: int = 8500, batch_size: int = 48, peak: float = 3e-3, seed: int = 0
) -> dict[str, int]:
    """Trains the rewriter and writes it to `folder/rewriter` (float16)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from .tokenizer import chat_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **LLAMA_CONFIG))

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        batch = training_batch(tokenizer, np.random.default_rng((seed, step)), batch_size)
        return "text", model(**{name: tensor.to(training_device()) for name, tensor in batch.items()}).loss

    def make_optimizers() -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)]

    # With a decay of 0, the average equals the weights.
    train(folder, "rewriter", steps, {"model": model}, make_optimizers, loss_of, peak, decay=0.0)
    rewriter = FirstFrameRewriter(model, tokenizer, instruction=INSTRUCTIONS, examples=False, max_new_tokens=96)
    rewriter.to(torch.float16).save_pretrained(folder / "rewriter")
    return {"samples": steps * batch_size, "parameters": sum(p.numel() for p in model.parameters())}
