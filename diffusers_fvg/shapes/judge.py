"""The judge of the shapes world's anchors: returns the probability that an image shows exactly what a caption says.

Shapes: B pairs, L words, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from transformers import UMT5Config, UMT5EncoderModel

from ..checks import stop_unless_finite
from ..compose.judge import Judgement
from ..devices import get_module_execution_device


class ShapesJudge(ModelMixin, ConfigMixin):
    """Two encoders, one of images and one of captions, and a classifier that compares their features.

    The features are sums over patches and over words, not means, so that three circles count three times one circle. The word
    embeddings come from the text encoder of the other shapes models, which stays frozen and knows only the words of
    `tokenizer.py`.

    Args:
        text_config (`dict`): config of the UMT5 encoder.
        sample_size (`int`): side of an image in pixels; others are resized.
        width, num_attention_heads, ffn_dim (`int`): sizes of the two encoders.
        sum_width (`int`): width of their features.
        max_words (`int`): most words of a caption that are read, including the end token.
        threshold (`float`): score in [0, 1] at which an image is good enough.
    """

    @register_to_config
    def __init__(
        self,
        text_config: dict[str, Any],
        sample_size: int = 64,
        width: int = 128,
        num_attention_heads: int = 4,
        ffn_dim: int = 256,
        sum_width: int = 192,
        max_words: int = 84,
        threshold: float = 0.5,
    ):
        super().__init__()
        self.text_encoder = UMT5EncoderModel(UMT5Config(**text_config)).encoder
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, 24, 5, stride=2, padding=2),
            torch.nn.GELU(),
            torch.nn.Conv2d(24, 48, 3, stride=2, padding=1),
            torch.nn.GELU(),
            torch.nn.Conv2d(48, 48, 3, padding=1),
            torch.nn.GELU(),
            torch.nn.Conv2d(48, width, 3, stride=2, padding=1),
        )
        self.places = torch.nn.Parameter(torch.randn(1, (sample_size // 8) ** 2, width) * 0.02)
        self.words = torch.nn.Linear(text_config["d_model"], width)

        def block() -> BasicTransformerBlock:
            size = width // num_attention_heads
            options = {"activation_fn": "gelu", "attention_bias": True, "ff_inner_dim": ffn_dim}
            return BasicTransformerBlock(width, num_attention_heads, size, **options)

        def terms() -> torch.nn.Sequential:
            layers = torch.nn.LayerNorm(width), torch.nn.Linear(width, ffn_dim), torch.nn.GELU()
            return torch.nn.Sequential(*layers, torch.nn.Linear(ffn_dim, sum_width))

        self.patch_blocks, self.word_blocks = (torch.nn.ModuleList([block()]) for _ in range(2))
        self.patch_terms, self.word_terms = terms(), terms()
        self.verdict = torch.nn.Sequential(
            torch.nn.Linear(2 * sum_width, ffn_dim), torch.nn.GELU(), torch.nn.Linear(ffn_dim, 1)
        )

    @cached_property
    def tokenizer(self):
        from .tokenizer import text_tokenizer

        return text_tokenizer()

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Returns token ids `(B, L)`, padded with 0, without the opening words that all captions share."""
        texts = [caption.rpartition(":")[2].strip() for caption in captions]
        options = {"padding": True, "truncation": True, "max_length": self.config.max_words}
        return self.tokenizer(texts, return_tensors="pt", **options).input_ids

    def read_pictures(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the features `(B, sum_width)` of images `(B, 3, H, W)` in [-1, 1]."""
        hidden_states = self.stem(pixel_values).flatten(2).mT + self.places
        for block in self.patch_blocks:
            hidden_states = block(hidden_states)
        return self.patch_terms(hidden_states).sum(1)

    def read_captions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the features `(B, sum_width)` of captions as token ids `(B, L)`."""
        mask = input_ids != 0
        hidden_states = self.words(self.text_encoder(input_ids, mask.long()).last_hidden_state)
        bias = torch.zeros_like(mask, dtype=hidden_states.dtype).masked_fill(~mask, float("-inf")).unsqueeze(1)
        for block in self.word_blocks:
            hidden_states = block(hidden_states, attention_mask=bias)
        return (self.word_terms(hidden_states) * mask.unsqueeze(-1)).sum(1)

    def compare(self, shown: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        """Returns the logits `(B,)` that images and captions with these features match."""
        difference = shown - said
        return self.verdict(torch.cat([difference, difference.abs()], dim=-1)).squeeze(-1)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits `(B,)` that each image shows exactly what its caption says.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): images in [-1, 1].
            input_ids (`torch.Tensor` of shape `(B, L)`): output of [`tokenize`].
        """
        return self.compare(self.read_pictures(pixel_values), self.read_captions(input_ids))

    @property
    def threshold(self) -> float:
        return self.config.threshold

    @torch.no_grad()
    def judge(
        self, images: list[PIL.Image.Image], captions: list[str], plans: list[Any] | None = None
    ) -> list[Judgement]:
        """Judges each image by its caption: the score is the probability that they match.

        Args:
            images (`list[PIL.Image.Image]`): RGB images of one size.
            captions (`list[str]`): one caption per image.
            plans (*optional*): ignored, because captions of this world hold all that a plan would.
        """
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        size = (self.config.sample_size, self.config.sample_size)
        if pixels.shape[-2:] != size:
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        device = get_module_execution_device(self)
        logits = self(pixels.to(device, self.dtype), self.tokenize(captions).to(device)).float()
        stop_unless_finite("judge", logits, self.dtype)
        return [Judgement(score) for score in logits.sigmoid().tolist()]
