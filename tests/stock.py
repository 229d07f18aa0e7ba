"""Tiny stock pipelines, and a record of what loading and saving them reads, writes, downloads and logs.

Imports nothing of the package: `tests/loading/test_stock_pipelines.py` runs it in processes with and without.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)


CLIP = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 4}
CLIP |= {"projection_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def tokenizer(word: str = "a") -> PreTrainedTokenizerFast:
    """One for each `word`, of one letter: the Hub's client fetches one of two equal files, and which is a matter of luck."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, word: 3}, unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=ord(word), **special)


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=4, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, latent_channels=4)


def wan() -> WanPipeline:
    sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 1, "freq_dim": 8}
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=8, rope_max_seq_len=8, **sizes),
    )


def sdxl() -> StableDiffusionXLPipeline:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("b"),
        unet=UNet2DConditionModel(
            block_out_channels=(4,),
            layers_per_block=1,
            norm_num_groups=2,
            cross_attention_dim=16,
            attention_head_dim=2,
            **blocks,
        ),
        scheduler=EulerDiscreteScheduler(),
    )


def flux() -> FluxPipeline:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer("b"),
        transformer=FluxTransformer2DModel(
            in_channels=16, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), **sizes
        ),
    )


PIPELINES = {"wan": wan, "sdxl": sdxl, "flux": flux}


def build(name: str) -> DiffusionPipeline:
    torch.manual_seed(0)
    return PIPELINES[name]()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(folder: str) -> dict[str, str]:
    """Returns every file below a folder with a hash of its bytes."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in files}


def content(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    """Returns the class of a pipeline and of each component, with a hash of its tensors or settings."""
    found = {"": [type(pipe).__name__, repr(sorted(pipe.config.items(), key=str))]}
    for name, part in pipe.components.items():
        data = repr(sorted(getattr(part, "config", {}).items(), key=str)) if not hasattr(part, "state_dict") else ""
        if hasattr(part, "state_dict"):
            state = part.state_dict().items()
            data = "".join(f"{key} {value.dtype} {digest(value.numpy().tobytes())}" for key, value in state)
        found[name] = [f"{type(part).__module__}.{type(part).__name__}", digest(data.encode())]
    return found


def attempt(path: str, **arguments) -> dict | str:
    try:
        return content(DiffusionPipeline.from_pretrained(path, **arguments))
    except (ValueError, OSError, TypeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def record(name: str) -> dict:
    """What one pipeline does in the current folder, and with the Hub's repository `org/<name>`."""
    pipe, seen = build(name), {}
    pipe.save_pretrained(name)
    pipe.save_pretrained(name, variant="fp16")
    seen["saved"] = tree(name)
    passed = {"vae": pipe.vae, "scheduler": pipe.scheduler}
    calls = {"plain": {}, "variant": {"variant": "fp16"}, "passed": passed, "half": {"dtype": torch.float16}}
    for kind, arguments in calls.items():
        seen[kind] = attempt(name, **arguments)
    seen["wrong"] = attempt(name, vae=pipe.scheduler)
    seen["no such variant"] = attempt(name, variant="int8")
    shutil.copytree(name, f"{name}-pickle")
    shutil.rmtree(f"{name}-pickle/vae")
    pipe.vae.save_pretrained(f"{name}-pickle/vae", safe_serialization=False)
    seen["pickle"] = attempt(f"{name}-pickle")
    DiffusionPipeline.from_pretrained(name).save_pretrained(f"{name}-again")
    seen["saved again"] = tree(f"{name}-again")
    for kind in ("plain", "variant", "passed"):
        seen[f"hub {kind}"] = attempt(f"org/{name}", cache_dir=f"cache-{name}-{kind}", **calls[kind])
    seen["hub without a variant"] = attempt(f"org/{name}", cache_dir=f"cache-{name}", variant="int8")
    return seen


class Said(logging.Handler):
    """Collects log lines with their origin."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, line: logging.LogRecord) -> None:
        self.lines.append(f"{line.name} {line.levelname} {line.getMessage()}")


def main(folder: str) -> None:
    """Prints a record of all pipelines as JSON. `folder` must be empty; the working directory becomes that."""
    os.chdir(folder)
    said = Said()
    for name in ("diffusers", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(said)
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("always")
        seen = {name: record(name) for name in PIPELINES}
    seen["said"] = said.lines
    seen["warned"] = [f"{warning.category.__name__} {warning.message}" for warning in caught]
    print(json.dumps(seen).replace(os.getcwd(), "FOLDER"))
