"""Trains the shapes world's rewriter from nothing: a Llama of 0.7 M parameters that answers in JSON, as a large one does.

It learns (prompt, first-frame caption) pairs of the grammar, the prompts also in looser wordings. Where a prompt leaves a
place open the captions disagree, and greedy decoding settles for the likeliest. Gate: `held_out_score` at 0.95 or better.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .held_out import held_out_scenes, score_written_caption
from .loop import train, training_device
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


def held_out_score(rewriter, per_category: int = 25, seed: int = 0) -> dict[str, float]:
    """Mean `score_written_caption` per category on held-out prompts: places count where the prompt settles them."""
    scores: dict[str, list[float]] = {}
    scenes = held_out_scenes(per_category, seed)
    for scene, caption in zip(scenes, rewriter.rewrite([scene.prompt for scene in scenes])):
        scores.setdefault(scene.category, []).append(score_written_caption(caption, scene))
    return {category: float(np.mean(values)) for category, values in scores.items()}


def train_rewriter(
    folder: Path, steps: int = 2500, batch_size: int = 48, peak: float = 3e-3, seed: int = 0
) -> dict[str, int]:
    """Trains and writes `folder/rewriter` (float16)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..rewriter import FirstFrameRewriter
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

    # A decay of 0 keeps the weights themselves.
    train(folder, "rewriter", steps, {"model": model}, make_optimizers, loss_of, peak, decay=0.0)
    rewriter = FirstFrameRewriter(model, tokenizer, instruction="", examples=False, max_new_tokens=64)
    rewriter.to(torch.float16).save_pretrained(folder / "rewriter")
    return {"samples": steps * batch_size, "parameters": sum(p.numel() for p in model.parameters())}
