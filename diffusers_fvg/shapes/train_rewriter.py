"""Trains the shapes world's rewriter from nothing: a Llama of 0.7 M parameters that answers in JSON, as a large one does.

It learns (prompt, first-frame caption) pairs of the grammar, the prompts also in looser wordings. Where a prompt leaves a
place open the captions disagree, and greedy decoding settles for the likeliest. Gate: `held_out_score` at 0.95 or better.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from .prompts import CATEGORIES, make_scene


LLAMA_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
CATEGORY_NAMES = (*CATEGORIES, "placement")
IGNORED = -100


def training_pair(tokenizer, rng: np.random.Generator) -> tuple[list[int], int]:
    """Token ids of a chat with its answer, and where the answer begins. Never a held-out prompt."""
    from ..rewriter_prompts import build_messages, format_answer
    from .tokenizer import loose_wording

    scene = make_scene(CATEGORY_NAMES[rng.integers(len(CATEGORY_NAMES))], rng, held_out=False)
    prompt = loose_wording(scene.prompt, rng) if rng.random() < 0.5 else scene.prompt
    chat = tokenizer.apply_chat_template(
        build_messages(prompt, instruction="", examples=()), tokenize=False, add_generation_prompt=True
    )
    question = tokenizer(chat, add_special_tokens=False).input_ids
    answer = tokenizer(format_answer(scene.caption), add_special_tokens=False).input_ids
    return question + answer + [tokenizer.eos_token_id], len(question)


def training_batch(tokenizer, rng: np.random.Generator, batch_size: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` `(B, L)`; the loss is on the answers alone."""
    pairs = [training_pair(tokenizer, rng) for _ in range(batch_size)]
    length = max(len(ids) for ids, _ in pairs)
    input_ids = torch.full((batch_size, length), tokenizer.pad_token_id)
    labels = torch.full((batch_size, length), IGNORED)
    for row, (ids, begin) in enumerate(pairs):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, begin : len(ids)] = torch.tensor(ids[begin:])
    return {"input_ids": input_ids, "attention_mask": (input_ids != tokenizer.pad_token_id).long(), "labels": labels}


# Categories whose prompts do not settle where things are; a mover's side is settled by its direction.
OPEN_PLACES = ("consistent_attr", "dynamic_attr", "action_binding", "motion_binding")
START_SIDE = {"left": "right", "right": "left", "up": "bottom", "down": "top"}


def held_out_score(rewriter, per_category: int = 25, seed: int = 0) -> dict[str, float]:
    """Mean `score_caption` per category on held-out prompts, with places where the prompt settles them.

    A caption that puts something moving left anywhere but on the right counts by the share of sides that are right.
    """
    from .report import held_out_scenes
    from .scorer import parse_caption, score_caption

    scores: dict[str, list[float]] = {}
    scenes = held_out_scenes(per_category, seed)
    for scene, caption in zip(scenes, rewriter.rewrite([scene.prompt for scene in scenes])):
        truth = scene.caption
        if scene.category in OPEN_PLACES:
            truth = ", ".join(part.split(" at the ")[0] for part in truth.split(", "))
        score = score_caption(caption, truth)
        if scene.category == "motion_binding":
            moves = {scene.meta[f"object_{k}"]: scene.meta[f"d_{k}"] for k in (1, 2) if scene.meta[f"object_{k}"]}
            places = {f"{colour} {shape}": place or "" for _, colour, shape, place in parse_caption(caption)}
            score *= np.mean([START_SIDE[way] in places.get(name, "") for name, way in moves.items()])
        scores.setdefault(scene.category, []).append(score)
    return {category: float(np.mean(values)) for category, values in scores.items()}


def train_rewriter(folder: Path, steps: int = 2500, batch_size: int = 48, peak: float = 3e-3, seed: int = 0) -> None:
    """Trains and writes `folder/rewriter` (float16), `folder/rewriter_log.jsonl`; continues from `folder/rewriter.ckpt`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..rewriter import FirstFrameRewriter
    from .tokenizer import chat_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **LLAMA_CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    step, checkpoint = 0, folder / "rewriter.ckpt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    recent, started = [], time.perf_counter()
    while step < steps:
        rate = peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss = model(**training_batch(tokenizer, np.random.default_rng((seed, step)), batch_size)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        step += 1
        recent.append(loss.item())
        if step % 50 == 0:
            seconds = (time.perf_counter() - started) / len(recent)
            record = {"step": step, "loss": float(np.mean(recent)), "seconds_per_step": seconds}
            with open(folder / "rewriter_log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            recent, started = [], time.perf_counter()
        if step % 250 == 0 or step == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    rewriter = FirstFrameRewriter(model.eval(), tokenizer, instruction="", examples=False, max_new_tokens=64)
    scores = held_out_score(rewriter)
    with open(folder / "rewriter_log.jsonl", "a") as log:
        log.write(json.dumps({"held_out_score": scores}) + "\n")
    print(json.dumps(scores, indent=1))
    rewriter.to(torch.float16).save_pretrained(folder / "rewriter")


if __name__ == "__main__":
    import sys

    train_rewriter(Path(sys.argv[1]))
