"""Real judges' models of transformers at tiny size. Random weights, the same each time."""

import torch
from tiny import WORDS, tiny_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from diffusers_fvg.compose.judge import AnchorJudge


VOCABULARY = len(WORDS) + 3
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 16, "patch_size": 8, "projection_dim": 8}
TEXT = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": 1}
IMAGES = {"size": {"height": 16, "width": 16}, "do_center_crop": False}
LLAVA_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def _tokenizer(*more: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(more))
    return tokenizer


def tiny_clip_judge(threshold: float | None = None) -> AnchorJudge:
    torch.manual_seed(0)
    text = TEXT | {"projection_dim": 8, "bos_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).eval()
    return AnchorJudge(model, CLIPProcessor(CLIPImageProcessor(**IMAGES), _tokenizer()), threshold=threshold)


def tiny_siglip_judge() -> AnchorJudge:
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()
    return AnchorJudge(model, SiglipProcessor(SiglipImageProcessor(size=IMAGES["size"]), _tokenizer()))


def tiny_chat_judge() -> AnchorJudge:
    """A vision-language model; its vocabulary is that of `tiny.py` with yes and no."""
    torch.manual_seed(0)
    tokenizer = _tokenizer("yes", "no", "<image>")
    text = SIZES | {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    config = LlavaConfig(
        text_config=text | {"num_key_value_heads": 2},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(**IMAGES),
        tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    return AnchorJudge(LlavaForConditionalGeneration(config).eval(), processor)
