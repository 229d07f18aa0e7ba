"""Word-level tokenizers of the world of coloured shapes, for its text encoder and for its rewriter.

Both share one vocabulary: every word of the prompt grammar and of the first-frame captions. Synonyms ("ball", "box", "gray",
"rolls leftwards") are replaced by the grammar's words before the text is split into tokens, so that the tiny models learn each
meaning once. All other words are `<unk>`.
"""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .prompts import ACTIONS, CAPTION_START, DIRECTIONS, EFFECTS, NUMBERS, RELATIONS
from .world import COLOURS, SHAPES


PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
# The rewriter answers in JSON. The JSON around a caption and the caption's first words are single tokens: they contain capitals
# and quotes, which the word-level vocabulary does not have, and answers get shorter.
ANSWER_START, ANSWER_END = '{"first_frame": "', '"}'
# Tokens that select the rewriter's other tasks, and the JSON around their answers. Moments have only the times on which
# `train_rewriter.py` trains.
STORYBOARD, MOTION = "<|storyboard|>", "<|motion|>"
MOMENT_TIMES = (0.5, 1.0)
MOMENTS_START, MOMENTS_END = '{"moments": [{"time": 0.0, "frame": "', '"}]}'
MOMENT_STARTS = tuple(f'"}}, {{"time": {time}, "frame": "' for time in MOMENT_TIMES)
MOTION_START = '{"motion": "'

# Pairs of a pattern and the grammar's words, applied in this order to lower-case text with single blanks.
_TO_LEFT = (
    r"(?:to|towards?) the (?:left|west)(?: (?:side|edge|part))?(?: of the (?:frame|screen|picture|image|video))?"
)
# Excludes the side on which one object covers another: "in front of the top left of a red circle".
_NO_SIDE = r"(?<!in front of |in front of the |behind |behind the |top |bottom )"
_MOVE = r"(?:go|roll|travel|glide|fly|run|walk|mov|float|shift)"
REWORDINGS = (
    (r"\b(?:balls|discs|disks|dots|orbs)\b", "circles"),
    (r"\b(?:ball|disc|disk|dot|orb)\b", "circle"),
    (r"\b(?:boxes|blocks|cubes|tiles|quadrats)\b", "squares"),
    (r"\b(?:box|block|cube|tile|quadrat)\b", "square"),
    (r"\b(?:pyramids|cones)\b", "triangles"),
    (r"\b(?:pyramid|cone)\b", "triangle"),
    (r"\bgr[ae]y\b", "grey"),
    (r"\b(?:crimson|scarlet)\b", "red"),
    (r"\b(?:purple|pink|violet|fuchsia)\b", "magenta"),
    (r"\b(?:turquoise|aqua|teal)\b", "cyan"),
    (r"\b(?:golden|gold)\b", "yellow"),
    (r"\blime(?: green)?\b", "green"),
    (r"\b(?:coloured|colored) ", ""),
    *((rf"\b{digit}\b", word) for digit, word in enumerate(NUMBERS)),
    # places
    (r"\bcent(?:er|re)\b", "centre"),
    (r"\bupper\b", "top"),
    (r"\blower\b", "bottom"),
    (r"(?:-| )hand\b", ""),
    (r"(?<=\btop|\bmiddle|\bbottom|\bcentre)-(?=left|right|centre|middle)", " "),
    (r"\bleft (?:corner|side|edge)\b(?! of)", "left"),
    (r"\bright (?:corner|side|edge)\b(?! of)", "right"),
    (r"\b(?:centre|left) (?=left\b)|(?<=\bmiddle )centre (?=left\b|right\b)", "middle "),
    (r"\bcentre (?=right\b)", "middle "),
    (r"\bleft (?:middle|centre)\b", "middle left"),
    (r"\bright (?:middle|centre)\b", "middle right"),
    (r"\b(?:middle centre|centre middle|middle middle|centre centre)\b", "centre"),
    (r"\bmiddle\b(?! left| right)", "centre"),
    (r"\b(?:in|on) the (?=top|middle|bottom|centre)", "at the "),
    # directions and relations
    (r"\b(?:from )?(?:the )?left to (?:the )?right\b", "to the right"),
    (r"\b(?:from )?(?:the )?right to (?:the )?left\b", "to the left"),
    (_TO_LEFT + r"\b(?! of)", "to the left"),
    (_TO_LEFT.replace("left|west", "right|east") + r"\b(?! of)", "to the right"),
    (r"\bleftwards?\b", "to the left"),
    (r"\brightwards?\b", "to the right"),
    (_NO_SIDE + r"\b(?:(?:to|at|on) )?(?:the )?left (?:side )?of\b", "on the left of"),
    (_NO_SIDE + r"\b(?:(?:to|at|on) )?(?:the )?right (?:side )?of\b", "on the right of"),
    (r"\b(?:on top of|over)\b", "above"),
    (r"\b(?:under|underneath|beneath)\b", "below"),
    (r"\bbefore\b", "in front of"),
    (r"\btoward\b", "towards"),
    # what happens
    (r"\b(?:rises|climbs|ascends|rising)(?: up(?:wards?)?)?\b", "moves upwards"),
    (r"\b(?:falls|drops|sinks|descends|falling)(?: down(?:wards?)?)?\b", "moves downwards"),
    (r"\b(?:up|upward)\b", "upwards"),
    (r"\b(?:down|downward)\b", "downwards"),
    (rf"\b(?:is |are )?(?:{_MOVE}(?:e?s|ing)|flies|moves|runs|running)\b", "moves"),
    (r"\b(?:is |are )?(?:drifting|wandering)\b|\bwanders\b", "drifts"),
    (r"\b(?:slides|bumps|crashes|runs|moves|collides|sliding) (?:into|against|with)\b|\bhits\b", "slides into"),
    (r"\b(?:pushing|kicking|sending) it\b", "knocking it"),
    (r"\b(?:vanish|fade away)\b", "disappear"),
    (r"\b(?:making|painting|colouring|coloring) it (?!disappear)", "turning it "),
    (
        r"\b(?:stays|stands|sits|remains|keeps|lies|is) (?:still|put|motionless|in place)\b|\bdoes not move\b",
        "stays still",
    ),
    (r"\b(?:is |are )?(?:growing|expanding)\b|\b(?:expands|enlarges|gets bigger|gets larger)\b", "grows"),
    (r"\b(?:is |are )?shrinking\b|\b(?:contracts|gets smaller)\b", "shrinks"),
    (r"\b(?:is |are )?(?:blinking|flashing)\b|\b(?:flashes|flickers)\b", "blinks"),
    (r"\b(?:is |are )?(?:bouncing|jumping|hopping)\b|\b(?:jumps|hops)\b(?: up and downwards)?", "bounces"),
    (r"\bbounces upwards and downwards\b", "bounces"),
    (
        r"\b(?:changes|turns|morphs|melts|becomes)(?: into)? (?=(?:an? |the )?(?:\w+ )?(?:circle|square|triangle)\b)",
        "transforms into ",
    ),
    (r"\b(?:changes|morphs|fades|becomes|is turning)\b(?: colour| color)?", "turns"),
    (r"\b(?:is|sits|lies|stands) (?=at the\b)", "rests "),
    (r"\b(?:sit|lie|stand|are) (?=(?:at|on)\b)", "rest "),
    (r"\b(?:sits|lies|stands) (?=on\b)", "rests "),
    (r"(?<=\bmoves )left\b(?! of)", "to the left"),
    (r"(?<=\bmoves )right\b(?! of)", "to the right"),
    (r"\b(?:large|huge|giant)\b", "big"),
    (r"\b(?:little|tiny)\b", "small"),
    (r"[\s.!]+$", ""),
)


# Words of the grammar's templates that are in none of its tables, and function words of prompts by users.
_GRAMMAR_WORDS = """a and while drifts slowly towards gradually turns from to transforms into moves slides
rests rest on plain background at the top middle bottom left centre right in of"""
_LOOSE_WORDS = "an is are there it its some small big then of with . , : ; ! ? ' \" - ( )"


def vocabulary() -> dict[str, int]:
    """Returns the id of each word: padding 0, end 1, unknown 2, then every word of prompts and captions, in a fixed order."""
    phrases = (*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *NUMBERS, *ACTIONS, *RELATIONS, *EFFECTS)
    phrases += (*(phrase for phrase, _, _ in DIRECTIONS.values()), CAPTION_START.lower(), _GRAMMAR_WORDS, _LOOSE_WORDS)
    words = " ".join(phrases).replace(",", " , ").replace(":", " : ").split()
    return {word: index for index, word in enumerate(dict.fromkeys((PAD, EOS, UNKNOWN, *words)))}


def loose_wording(prompt: str, rng: np.random.Generator) -> str:
    """Rewrites a prompt of the grammar as a user may type it: with other articles, sizes, fillers and missing words.

    Synonyms are not used, because the tokenizers replace them. The meaning of the prompt stays the same.
    """
    words = []
    for word in prompt.lower().replace(",", " ,").split():
        if word in ("slowly", "gradually") and rng.random() < 0.3:
            continue
        if word == "while" and rng.random() < 0.3:
            word = "and"
        if word in ("a", "one") and (len(words) == 0 or words[-1] not in ("on", "from")):
            word = rng.choice(("a", "a", "a", "the", "the", "one", ""))
        if word in COLOURS and (not words or words[-1] in ("", "a", "the", "one")) and rng.random() < 0.15:
            words.append(rng.choice(("small", "big", "bright", "nice")))
        words.append(word)
    text = " ".join(word for word in words if word)
    ending = " on a plain background"
    if text.endswith(ending):
        text = text.removesuffix(rng.choice(("", ending, f" rest{ending}", f" rests{ending}")))
    elif rng.random() < 0.05:
        text += ending
    if rng.random() < 0.08:
        text = rng.choice(("there is ", "please draw ", "a video of ", "here ")) + text
    return text


def canonical_words(text: str) -> str:
    """Lower-cases a text and replaces synonyms by the grammar's words, as both tokenizers do."""
    return _normalizer().normalize_str(text)


def _normalizer() -> normalizers.Normalizer:
    steps = [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    steps += [normalizers.Replace(Regex(pattern), words) for pattern, words in REWORDINGS]
    return normalizers.Sequence(steps)


def _word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    # Adds a blank before each word but not before punctuation. The rewriter's added tokens begin with other characters.
    blanks = decoders.Replace(Regex(r"\A(?=[a-z])"), " ")
    tokenizer.decoder = decoders.Sequence([blanks, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the text encoder's tokenizer: lower-case words, `</s>` at the end, at most 112 tokens."""
    tokenizer = _word_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary()[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=112,
        model_input_names=["input_ids", "attention_mask"],
    )


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the rewriter's tokenizer: the same words and ids, and tokens for the turns of a chat and the JSON of answers."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_level(),
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=256,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )
    roles = [
        AddedToken(role, normalized=False, special=True) for role in (SYSTEM, USER, ASSISTANT, STORYBOARD, MOTION)
    ]
    frames = (ANSWER_START, ANSWER_END, CAPTION_START, MOMENTS_START, *MOMENT_STARTS, MOMENTS_END, MOTION_START)
    answer = [AddedToken(text, normalized=False) for text in frames]
    tokenizer.add_tokens(roles, special_tokens=True)
    tokenizer.add_tokens(answer)
    return tokenizer
