"""Makes hostile repositories: a sound one, spoiled in the ways that an attacker would try.

Texts of traps may hold `@SPRUNG@`, a file that code in the repository would make, `@SECRET@`, a file outside of it, and
`@ADDRESS@`, of a server that is not the Hub.
"""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open


VARIABLE = "FVG_CANARY_VARIABLE"
# Ways to write a variable, which programs of many kinds replace by its value.
INTERPOLATIONS = [form.replace("X", VARIABLE) for form in ("$X", "${X}", "%X%", "{{ env.X }}", "${env:X}")]
ESCAPES = (
    "../evil",
    "/etc/evil",
    "..\\evil",
    "C:\\evil",
    "~/evil",
    "..%2fevil",
    "\uff0e\uff0e\uff0fevil",
    "evil\0.json",
)
INDEX = "model_index.json"
WEIGHTS = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "rewriter": "rewriter/model/model.safetensors",
    "composer": "composer/text_encoder/model.safetensors",
    "anchor_judge": "anchor_judge/diffusion_pytorch_model.safetensors",
    "anchor_lora": "anchor_lora/weights/pytorch_lora_weights.safetensors",
}
CONFIGS = {
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "rewriter": "rewriter/model/config.json",
    "composer": "composer/text_encoder/config.json",
    "anchor_judge": "anchor_judge/config.json",
}
TOKENIZERS = {"tokenizer": "tokenizer/tokenizer_config.json", "rewriter": "rewriter/tokenizer/tokenizer_config.json"}
CODE = "import pathlib\npathlib.Path('@SPRUNG@').touch()\nclass P: pass\n"


@dataclass(frozen=True)
class Site:
    """A repository that is spoiled, hard links to a sound one, and what its traps name.

    Args:
        folder (`Path`): the repository.
        outside (`Path`): a folder beside it, with `secret.txt`.
        address (`str`): of a server that is not the Hub.
    """

    folder: Path
    outside: Path
    address: str

    @classmethod
    def make(cls, sound: Path, place: Path, address: str) -> "Site":
        site = cls(place / "repository", place / "outside", address)
        shutil.copytree(sound, site.folder, copy_function=os.link)
        site.outside.mkdir()
        (site.outside / "secret.txt").write_text("secret")
        return site

    @property
    def sprung(self) -> Path:
        return self.outside / "sprung"

    def write(self, name: str, data: bytes | str) -> None:
        """Writes a file of the repository anew: the sound one has the same content on the disk."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        places = {"@SPRUNG@": self.sprung, "@SECRET@": self.outside / "secret.txt", "@ADDRESS@": self.address}
        for word, place in places.items() if isinstance(data, str) else ():
            data = data.replace(word, str(place))
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    def edit(self, name: str, **changes: Any) -> None:
        path = self.folder / name
        values = json.loads(path.read_text()) if path.is_file() else {}
        self.write(name, json.dumps(values | changes))

    def write_bomb(self, name: str) -> None:
        """A pickle that runs a command when it is read."""
        self.write(name, pickle.dumps(_Bomb(f"touch {self.sprung}")))

    def remove(self, name: str) -> None:
        path = self.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Bomb:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@dataclass(frozen=True)
class Trap:
    """One hostile repository.

    Args:
        name (`str`): of the attack.
        part (`str`): component that is loaded; the others are passed.
        spoil (`Callable`): of a [`Site`].
        told (`str`, *optional*): pattern of the error; `None` where the trap has no effect and the component loads.
    """

    name: str
    part: str
    spoil: Callable[[Site], Any]
    told: str | None


def traps() -> Iterator[Trap]:
    for group in (pickles, code, settings, names, links, headers, environment, addresses, templates, texts):
        for name, part, spoil, told in group():
            yield Trap(f"{group.__name__}: {name}", part, spoil, told)


def edit(name: str, **changes: Any) -> Callable[[Site], None]:
    return lambda site: site.edit(name, **changes)


def write(name: str, data: bytes | str) -> Callable[[Site], None]:
    return lambda site: site.write(name, data)


def write_bomb(name: str, in_place_of: str | None = None) -> Callable[[Site], None]:
    return both(lambda site: in_place_of and site.remove(in_place_of), lambda site: site.write_bomb(name))


def both(*spoils: Callable[[Site], Any]) -> Callable[[Site], None]:
    def spoil(site: Site) -> None:
        for each in spoils:
            each(site)

    return spoil


# -- pickles under every name -----------------------------------------------------------------------------------------


def pickles():
    for part, file in WEIGHTS.items():
        stem = Path(file).stem
        name = Path(file).with_name("pytorch_model.bin" if stem == "model" else f"{stem}.bin")
        yield f"{part} as {name.name}", part, write_bomb(str(name), file), "pickle"
        yield f"{part}, called safetensors", part, write_bomb(file), "damaged|[Hh]eader|safetensors|weights"
    for suffix in (".pt", ".pth", ".ckpt", ".pkl"):
        name = f"vae/diffusion_pytorch_model{suffix}"
        yield f"vae as {suffix}", "vae", write_bomb(name, WEIGHTS["vae"]), "pickle"
    for name in ("optimizer.pt", "training_args.bin", "diffusion_pytorch_model.bin", "scaler.pkl"):
        yield f"{name} beside the weights", "vae", write_bomb(f"vae/{name}"), None
    for name in ("vocab.pkl", "tokenizer.pkl", "vocab.bin"):
        yield f"{name} beside the tokenizer", "tokenizer", write_bomb(f"tokenizer/{name}"), None
    yield "tokenizer.json", "tokenizer", write_bomb("tokenizer/tokenizer.json"), "damaged"
    yield "scheduler.bin", "scheduler", write_bomb("scheduler/scheduler.bin"), None
    yield "a preset", "schedulers", write_bomb("schedulers/full-50/x.pkl"), None


# -- code -------------------------------------------------------------------------------------------------------------


def code():
    for name in ("pipeline", "__init__", "setup", "conftest", "sitecustomize", "diffusers", "vae/__init__"):
        yield name, "vae", write(f"{name}.py", CODE), None
    yield "None", "vae", write("None.py", CODE), "trust_remote_code"
    evil = write("evil.py", CODE)
    for changes in ({}, {"trust_remote_code": True}, {"custom_pipeline": "evil"}):
        spoil = both(evil, edit(INDEX, _class_name=["evil", "P"], **changes))
        yield f"_class_name {changes or ''}", "vae", spoil, "trust_remote_code"
    yield "custom_pipeline", "vae", both(evil, edit(INDEX, custom_pipeline="evil")), None
    told = "not a model|not been imported|trust_remote_code|has no"
    for library in (
        "evil",
        "os",
        "subprocess",
        "builtins",
        "importlib",
        "diffusers_fvg.cli",
        "diffuser\u0455",
        "torch",
    ):
        spoil = both(write("vae/evil.py", CODE), edit(INDEX, vae=[library, "system"]))
        yield f"library {ascii(library)}", "vae", spoil, told
    for kind in ("AutoModel", "DiffusionPipeline", "OnnxRuntimeModel", "__init__", "__class__", "models.AutoModel"):
        yield (
            f"class {kind}",
            "vae",
            edit(INDEX, vae=["diffusers", kind]),
            "not a model|has no|attribute|no file named",
        )
    automatic = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "evil.P")
    for part, file in CONFIGS.items():
        evil = write(str(Path(file).with_name("evil.py")), CODE)
        yield f"auto_map of {part}", part, both(evil, edit(file, auto_map=automatic, trust_remote_code=True)), None
        if part == "rewriter":
            new = edit(file, auto_map=automatic, trust_remote_code=True, model_type="evil")
            yield f"auto_map of {part}, an unknown type", part, both(evil, new), "trust_remote_code"
    for part, file in TOKENIZERS.items():
        evil = write(str(Path(file).with_name("evil.py")), CODE)
        automatic = {"AutoTokenizer": ["evil.P", "evil.P"]}
        changes = {"auto_map": automatic, "tokenizer_class": "P", "trust_remote_code": True}
        # transformers takes a class by its name for the pipeline's own, and asks for the rewriter's.
        told = "trust_remote_code" if part == "rewriter" else None
        yield f"auto_map of the tokenizer of {part}", part, both(evil, edit(file, **changes)), told
        for kind in ("os.system", "evil.P", "builtins.eval", "AutoTokenizer"):
            told = "not a tokenizer class" if kind == "AutoTokenizer" else None
            yield f"tokenizer_class {kind} of {part}", part, both(evil, edit(file, tokenizer_class=kind)), told
    generate = write("rewriter/model/custom_generate/generate.py", CODE)
    asked = edit("rewriter/model/generation_config.json", custom_generate="@SPRUNG@/..", trust_remote_code=True)
    yield "custom_generate", "rewriter", both(generate, asked), None
    for kernel in ("org/kernel", "org/kernel@main:f", "flash_attention_2|org/kernel"):
        for part in ("text_encoder", "rewriter"):
            spoil = edit(CONFIGS[part], attn_implementation=kernel)
            yield f"attn_implementation {kernel} of {part}", part, spoil, "another repository"
    yield (
        "modular",
        "vae",
        both(write("evil.py", CODE), edit("modular_config.json", auto_map={"ModularPipelineBlocks": "evil.P"})),
        None,
    )


# -- settings that have files or repositories opened ------------------------------------------------------------------


def settings():
    for name in ("vocab_file", "merges_file", "tokenizer_file", "added_tokens_file", "spm_file", "sp_model_path"):
        for part, file in TOKENIZERS.items():
            yield f"{name} of {part}", part, edit(file, **{name: "@SECRET@"}), "local file outside"
    spoil = edit("tokenizer/special_tokens_map.json", vocab_file="@SECRET@")
    yield "special_tokens_map", "tokenizer", spoil, "local file outside"
    for name in ("gguf_file", "init_inputs"):
        yield name, "tokenizer", edit(TOKENIZERS["tokenizer"], **{name: ["@SECRET@"]}), "open another file"
    for name in ("backbone", "tokenizer"):
        yield name, "text_encoder", edit(CONFIGS["text_encoder"], **{name: "org/other"}), "elsewhere"
    for name in ("transformers_weights", "configuration_files", "extra_files"):
        yield name, "text_encoder", edit(CONFIGS["text_encoder"], **{name: ["../vae/x.json"]}), "does not stay"
    adapter = edit("text_encoder/adapter_config.json", base_model_name_or_path="@SECRET@")
    yield "adapter_config.json", "text_encoder", adapter, "PEFT adapter"
    yield "_name_or_path", "text_encoder", edit(CONFIGS["text_encoder"], _name_or_path="@SECRET@"), None
    quantized = edit(CONFIGS["text_encoder"], quantization_config={"quant_method": "evil"})
    yield "quantization_config", "text_encoder", quantized, None
    yield (
        "gguf_file of a rewriter",
        "rewriter",
        edit("rewriter/rewriter_config.json", gguf_file="../x.gguf"),
        "names no",
    )


# -- names that leave their folder ------------------------------------------------------------------------------------


REFERENCE = {"repository": "org/name", "library": "diffusers", "class": "AutoencoderKLWan"}


def names():
    for escape in ESCAPES:
        shown = ascii(escape)
        yield f"a component {shown}", "vae", edit(INDEX, **{escape: ["diffusers", "AutoencoderKLWan"]}), None
        yield f"a shard {shown}", "vae", sharded(escape), "does not stay|does not appear to have"
        yield f"a preset {shown}", "schedulers", preset(name=escape), "rename the folder"
        yield f"a reference's folder {shown}", "vae", reference(subfolder=escape), "not a path within"
        yield f"a reference's repository {shown}", "vae", reference(repository=escape), "[Rr]epo id"
        yield f"a composer {shown}", "composer", composer(repository=escape), "[Rr]epo id"
        told = "does not stay|cannot be loaded"
        yield f"a composer's revision {shown}", "composer", composer(repository="org/name", revision=escape), told
    for name in ("os", "transformers.utils", "diffusers.utils"):
        yield f"a reference's library {name}", "vae", reference(library=name), "library"


def sharded(shard: str) -> Callable[[Site], None]:
    def spoil(site: Site) -> None:
        with safe_open(site.folder / WEIGHTS["vae"], framework="np") as tensors:
            shards = dict.fromkeys(tensors.keys(), shard)
        site.remove(WEIGHTS["vae"])
        site.edit(f"{WEIGHTS['vae']}.index.json", metadata={}, weight_map=shards)

    return spoil


def preset(**changes: Any) -> Callable[[Site], None]:
    def spoil(site: Site) -> None:
        file = "schedulers/full-50/scheduler_config.json"
        site.edit(file, _preset=json.loads((site.folder / file).read_text())["_preset"] | changes)

    return spoil


def reference(**changes: str) -> Callable[[Site], None]:
    written = edit("vae/reference.json", **REFERENCE | changes)
    return both(lambda site: site.remove("vae"), written, edit(INDEX, vae=["diffusers", "HubReference"]))


def composer(**values: str) -> Callable[[Site], None]:
    return both(lambda site: site.remove("composer"), edit("composer/composer_config.json", **values))


# -- links ------------------------------------------------------------------------------------------------------------


def links():
    linked = (
        "vae",
        "vae/config.json",
        WEIGHTS["vae"],
        "tokenizer/tokenizer.json",
        "schedulers/full-50",
        "composer/vae",
    )
    for name in (INDEX, "rewriter/model", *linked):

        def outside(site: Site, name: str = name) -> None:
            place = site.outside / Path(name).name
            shutil.move(site.folder / name, place)
            (site.folder / name).symlink_to(place)

        yield f"{name} outside", "vae" if name == INDEX else name.split("/")[0], outside, "link to"
    yield "to a secret", "vae", lambda site: (site.folder / "vae/x").symlink_to(site.outside / "secret.txt"), "link to"
    yield "in a circle", "vae", lambda site: (site.folder / "vae/x").symlink_to("x"), "leads to no file"
    yield (
        "a pipe",
        "vae",
        both(lambda site: site.remove(CONFIGS["vae"]), lambda site: os.mkfifo(site.folder / CONFIGS["vae"])),
        "a pipe",
    )


# -- headers ----------------------------------------------------------------------------------------------------------


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


def tensor(dtype: str = "F32", shape: str = "1", start: int = 0, end: int = 4, name: str = "a") -> str:
    return f'"{name}": {{"dtype": "{dtype}", "shape": [{shape}], "data_offsets": [{start}, {end}]}}'


def headers():
    files = {
        "nothing": b"",
        "8 bytes": b"\0" * 8,
        "empty": header("{}"),
        "metadata alone": header('{"__metadata__": {"format": "pt"}}'),
        "of 2^62 bytes": header("{}", length=2**62),
        "of 100 MB": header("{}", length=99_999_999),
        "deep": header('{"a":' * 20_000 + "0" + "}" * 20_000),
        "no object": header("[1, 2]"),
        "a wrong type": header(f"{{{tensor('P64', end=8)}}}", b"\0" * 8),
        "beyond the end": header(f"{{{tensor(shape='4', end=16)}}}", b"\0" * 8),
        "negative": header(f"{{{tensor(start=-4, end=0)}}}", b"\0" * 4),
        "overlapping": header(f"{{{tensor()}, {tensor(name='b')}}}", b"\0" * 4),
        "a huge shape": header(f"{{{tensor(shape='99999999999, 99999999999')}}}", b"\0" * 4),
        "another tensor": header(f"{{{tensor()}}}", b"\0" * 4),
    }
    for name, data in files.items():
        for part in ("vae", "text_encoder", "rewriter", "composer"):
            yield f"{name}, {part}", part, write(WEIGHTS[part], data), ""


# -- the environment --------------------------------------------------------------------------------------------------


def environment():
    for text in INTERPOLATIONS:
        yield f"a repository {text}", "composer", composer(repository=text), "[Rr]epo id"
        yield f"a revision {text}", "composer", composer(repository="org/name", revision=text), "cannot be loaded"
        yield f"a vocabulary {text}", "tokenizer", edit(TOKENIZERS["tokenizer"], vocab_file=text), None
        yield f"an instruction {text}", "rewriter", edit("rewriter/rewriter_config.json", instruction=text), None
        yield f"a default {text}", "vae", edit(INDEX, call_defaults={"negative_prompt": text}), None
    judge = edit("anchor_judge/judge_config.json", endpoint="@ADDRESS@", api_key_env=VARIABLE)
    named = both(judge, edit(INDEX, anchor_judge=["diffusers", "AnchorJudge"]))
    yield "a judge's key", "anchor_judge", named, "names an endpoint"
    rewriter = edit("rewriter/rewriter_config.json", endpoint="@ADDRESS@", api_key_env=VARIABLE, model="m")
    yield "a rewriter's key", "rewriter", rewriter, "names an endpoint"


# -- addresses --------------------------------------------------------------------------------------------------------


def addresses():
    yield "a composer", "composer", composer(repository="@ADDRESS@"), "[Rr]epo id"
    picture = edit("composer/composer_config.json", call_defaults={"image": "@ADDRESS@"})
    yield "a composer's picture", "composer", picture, "a URL"
    yield "a reference", "vae", reference(repository="@ADDRESS@"), "[Rr]epo id"
    yield "a shard", "vae", sharded("@ADDRESS@/x.safetensors"), "does not stay"
    for name in ("vocab_file", "tokenizer_file", "name_or_path"):
        yield f"{name} of a tokenizer", "tokenizer", edit(TOKENIZERS["tokenizer"], **{name: "@ADDRESS@"}), None
    for name in ("_name_or_path", "pretrained_model_name_or_path", "base_model_name_or_path", "hub_url"):
        for part in ("text_encoder", "vae"):
            yield f"{name} of {part}", part, edit(CONFIGS[part], **{name: "@ADDRESS@"}), None
    yield "_name_or_path of the index", "vae", edit(INDEX, _name_or_path="@ADDRESS@"), None
    yield "another Hub", "composer", composer(repository="org/name", endpoint="@ADDRESS@"), "has the unknown keys"
    others = both(
        write("composer/README.md", "---\nprior:\n- @ADDRESS@\n---\n"),
        edit("composer/model_index.json", _class_name="KandinskyV22CombinedPipeline"),
    )
    yield "a README's other pipelines", "composer", others, "README.md names other pipelines"
    yield "a .env", "vae", write(".env", "HF_ENDPOINT=@ADDRESS@\n"), None
    yield "a pip.conf", "vae", write("pip.conf", "[global]\nindex-url=@ADDRESS@\n"), None


# -- chat templates ---------------------------------------------------------------------------------------------------

ESCAPING = (
    "{{ cycler.__init__.__globals__.os.system('touch @SPRUNG@') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].popen('touch @SPRUNG@').read() }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{% for c in ().__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}",
    "{{ raise_exception.__globals__['__builtins__']['open']('@SPRUNG@', 'w') }}",
    f"{{{{ strftime_now.__globals__.os.environ['{VARIABLE}'] }}}}",
    "{{ namespace.__init__.__globals__['sys'].modules['os'].system('touch @SPRUNG@') }}",
    "{{ (messages | map(attribute='__class__') | first).mro() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{% include '@SECRET@' %}",
    "{% import '@SECRET@' as s %}{{ s }}",
    "{% extends '@SECRET@' %}",
)


def templates():
    for template in ESCAPING:
        yield template[:30], "rewriter", write("rewriter/tokenizer/chat_template.jinja", template), "chat template"


# -- texts that are read in two ways, or not at all -------------------------------------------------------------------


def texts():
    forms = {
        "deep": '{"a":' * 50_000 + "1" + "}" * 50_000,
        "no object": "[]",
        "nothing": "",
        "UTF-16": "{}".encode("utf-16"),
    }
    files = {
        "vae": [INDEX, CONFIGS["vae"]],
        "text_encoder": [CONFIGS["text_encoder"]],
        "tokenizer": [TOKENIZERS["tokenizer"]],
        "scheduler": ["scheduler/scheduler_config.json"],
        "schedulers": ["schedulers/full-50/scheduler_config.json"],
        "rewriter": ["rewriter/rewriter_config.json", CONFIGS["rewriter"], "rewriter/tokenizer/tokenizer.json"],
        "composer": ["composer/composer_config.json", "composer/model_index.json"],
        "anchor_judge": [CONFIGS["anchor_judge"]],
    }
    for part, own in files.items():
        for file in own:
            for name, text in forms.items():
                yield f"{name}, {file}", part, write(file, text), ""
    deep = json.loads('{"a":' * 400 + "1" + "}" * 400)
    yield "rather deep", "text_encoder", edit(CONFIGS["text_encoder"], sub_config=deep), None
    for part in ("vae", "rewriter", "anchor_judge"):
        yield f"an empty object, {part}", part, write(INDEX if part == "vae" else CONFIGS[part], "{}"), ""
    index = {"_class_name": "FactorizedVideoPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}
    twice = json.dumps(index)[:-1] + ', "vae": ["os", "system"]}'
    yield "a name twice", "vae", write(INDEX, twice), "not a model"
    yield "a name with a space of no width", "vae", edit(INDEX, **{"vae\u200b": ["os", "system"]}), None
    yield "a name that runs backwards", "vae", edit(INDEX, **{"\u202evae": ["os", "system"]}), None
    empty = f"{WEIGHTS['text_encoder']}.index.json"
    unmapped = both(lambda site: site.remove(WEIGHTS["text_encoder"]), write(empty, "{}"))
    yield "an index of shards without a map", "text_encoder", unmapped, "weight_map"
