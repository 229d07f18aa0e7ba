"""Files of training runs, read and checked as `fvg train` does."""

from __future__ import annotations

from bad_rows import Row, Shared

from diffusers_fvg.training.config import TrainConfig


GOOD = """model = "org/model"
data = "data"
cache_dir = "cache"
output_dir = "out"
buckets = [[17, 64, 64]]
frame_rate = 8
"""
DREAMER = 'system = "dreamer"\n'


def config(line: str, *words: str, kind: type = TrainConfig, base: str = GOOD) -> Row:
    """The good file with a line of it replaced, or one more."""

    def give(shared: Shared) -> None:
        name = line.split("=")[0].strip()
        others = [other for other in base.splitlines() if other.split("=")[0].strip() != name]
        kind.load(shared.write("run.toml", "\n".join([*others, line, ""])))

    return Row(f"config: {line if len(line) <= 60 else line[:56]}", give, words)


def whole(text: str | bytes, title: str, *words: str) -> Row:
    return Row(f"config: {title}", lambda shared: TrainConfig.load(shared.write("run.toml", text)), words)


COUNTS = ("steps", "batch_size", "gradient_accumulation_steps", "clips_per_video", "max_sequence_length", "rank")
ROWS = [
    *(config(f"{name} = 0", f"`{name}=0`", "must be at least 1") for name in (*COUNTS, "checkpoint_every")),
    *(config(f"{name} = 1000000000", f"`{name}=1000000000`", "must be at most") for name in COUNTS),
    *(config(f"{name} = true", f"`{name}=True`", "type int") for name in COUNTS),
    *(config(f"{name} = 1.5", f"`{name}=1.5`", "type int") for name in COUNTS),
    *(config(f"{name} = nan", f"`{name}=nan`", "type int") for name in COUNTS),
    *(config(f'{name} = "8"', f"`{name}='8'`", "type int") for name in COUNTS),
    *(config(f"{name} = nan", f"`{name}=nan`", "above 0") for name in ("learning_rate", "alpha", "flow_shift")),
    *(config(f"{name} = 0", f"`{name}=0.0`", "above 0") for name in ("learning_rate", "alpha", "max_grad_norm")),
    *(config(f"{name} = 1e30", f"`{name}=1e+30`", "at most") for name in ("learning_rate", "alpha", "weight_decay")),
    *(config(f"{name} = true", f"`{name}=True`", "type float") for name in ("learning_rate", "frame_rate")),
    *(config(f"{name} = 1", f"`{name}=1.0`", "[0, 1)") for name in ("prompt_dropout", "ema_decay", "anchor_noise")),
    config("frame_rate = 0", "`frame_rate=0.0`", "above 0"),
    config("frame_rate = 1e9", "`frame_rate=1000000000.0`", "at most 1000"),
    config("frame_rate = " + "9" * 400, "`frame_rate=inf`", "above 0"),
    config("seed = -1", "`seed=-1`", "must not be negative"),
    config("seed = 99999999999999999999", "`seed=", "must be at most"),
    config("warmup_steps = 5000", "`warmup_steps=5000`", "below steps=2000"),
    config("anchor_probability = 2.0", "`anchor_probability=2.0`", "[0, 1]"),
    config("anchor_probability = 0.0", "anchor_probability", "trains no anchor"),
    config('anchor_position = "last"', "`anchor_position='last'`", "must be one of 'first'"),
    config('mixed_precision = "fp8"', "`mixed_precision='fp8'`", "must be one of 'no'"),
    config('quantize = "int3"', "`quantize='int3'`", "must be one of 'none'"),
    config('optimizer = "lion"', "`optimizer='lion'`", "must be one of 'adamw'"),
    config('tracker = "mlflow"', "`tracker='mlflow'`", "must be one of 'none'"),
    config('experts = ["transformer_3"]', "experts", "may hold ['transformer', 'transformer_2']"),
    config("experts = []", "experts", "at least one value"),
    config('targets = ["to_q", "to_q"]', "targets", "each once"),
    config("buckets = []", "buckets", "needs at least one"),
    config("buckets = [[1, 64, 64]]", "buckets", "more than one frame"),
    config("buckets = [[17, 64]]", "buckets", "type"),
    config("buckets = [[17, 64, 64.5]]", "buckets", "type int"),
    config("buckets = [[17, -64, 64]]", "buckets", "must be at least 1"),
    config("buckets = [[17, 64, 64], [17, 64, 64]]", "buckets", "each once"),
    config("buckets = 17", "`buckets=17`", "type"),
    config('model = ""', "`model=''`", "must not be empty"),
    config('data = " "', "data", "must name a folder or a dataset"),
    config("data = 3", "`data=3`", "type str"),
    config("data = [{path = 3}]", "data.path", "type str"),
    config('data = [{path = "a", weight = 1}]', "weight", "`path` and, if wanted, path, repeats"),
    config('data = [{path = "a", repeats = nan}]', "data", "above 0"),
    config('data = [{path = "a", repeats = -1}]', "data", "above 0"),
    config("no_such_key = 1", "unknown keys ['no_such_key']", "known ones are model"),
    config('validation_prompts = ["a"]', "validation_prompts", "validation_every=0"),
    config("distill_guidance = [1.0]", "distill_guidance", "must be above 1"),
    config("distill_guidance = [nan]", "distill_guidance", "must be above 1"),
    config("anchor_window = -1", "`anchor_window=-1`", "must not be negative"),
    config('negative_prompt = "blur"', "negative_prompt", "without distill_guidance: remove it"),
    config("block_offload = true\ngradient_checkpointing = false", "block_offload", "needs gradient_checkpointing"),
    whole("", "an empty file", "lacks the keys ['model'"),
    whole("model = ", "half a line", "is not valid TOML"),
    whole("model = 1\nmodel = 2", "a key twice", "is not valid TOML"),
    whole("[" * 20_000, "20000 brackets", "is not valid TOML"),
    whole(f"a = {'[' * 20_000}{']' * 20_000}", "deep lists", "is not valid TOML"),
    whole(f"a = {'9' * 5000}", "a number of 5000 digits", "is not valid TOML"),
    whole(b"\xff\xfe\x00m", "UTF-16", "is not valid TOML"),
    whole(b"\x00" * 100, "zeros", "is not valid TOML"),
    whole('model = "\\ud800"', "half a character", "is not valid TOML"),
]
