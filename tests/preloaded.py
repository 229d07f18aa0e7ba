"""What the server of forked processes does once for all of them: imports, and what a first LoRA makes the packages look up."""

import gc

from peft import LoraConfig
from tiny import tiny_transformer

import diffusers_fvg.training.dreamer
import diffusers_fvg.training.trainer  # noqa: F401


tiny_transformer().add_adapter(LoraConfig(target_modules=["to_q"]))
# A search for garbage in a forked process would copy every page with an imported object.
gc.collect()
gc.freeze()
