"""ToyWorld's tokenizers: one word, one token. Saved as ``tokenizer.json``, so that ``AutoTokenizer`` loads them as it
does the real ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowmem_drf.questions import check, fixed, phrases, toyworld
from lowmem_drf.toy.captions import vocabulary

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'user' %}<|im_end|>{% endif %}{% endfor %}"
)


def _question_words() -> list[str]:
    pairs = [
        *toyworld.ALIGNMENT.values(),
        *toyworld.PHYSICS.values(),
        *toyworld.QUALITY.values(),
        *toyworld.SOUND.values(),
        toyworld.GLOBAL,
    ]
    asked = [
        *(wording for pair in pairs for wording in pair),
        *toyworld.OPEN.values(),
        toyworld.DESCRIBE,
        toyworld.EXPLAIN_MOTION,
        toyworld.EXPLAIN_PICTURE,
    ]
    said = [
        "yes no",
        *toyworld.EXPLANATIONS.values(),
        toyworld.SOUND_PICTURE,
        *(toyworld.sound_motion(direction) for direction in toyworld.ATTRIBUTES["direction"]),
    ]
    return " ".join([*asked, *said]).replace("{value}", "").replace("{caption}", "").split()


def _reader_words() -> list[str]:
    """The words of ``phrases`` and of the check, in the order in which they are split."""
    asked = [*phrases.WORDINGS, fixed.ANSWER, check.DESCRIBED, check.BLIND, check.RIGHT]
    return re.findall(r"\w+|[^\w\s]", " ".join(re.sub(r"{\w*}", " ", text) for text in asked).lower())


def _tokenizer(
    words: list[str], special: list[str], pad: str, end: str, add_end: bool = False, more: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """``more``: words whose ids follow those of ``words``."""
    vocab = {w: i for i, w in enumerate(dict.fromkeys([*special, *sorted(set(words)), *sorted(set(more))]))}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if add_end:
        tok.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, vocab[end])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", pad_token=pad, eos_token=end, additional_special_tokens=special
    )


def text_tokenizer() -> PreTrainedTokenizerFast:
    """For the UMT5 encoder: caption words, ``</s>`` at the end, padded with ``<pad>``."""
    return _tokenizer(vocabulary(), ["<pad>", "</s>", "<unk>"], pad="<pad>", end="</s>", add_end=True)


def critic_tokenizer(reader: bool = False) -> PreTrainedTokenizerFast:
    """For the critic: caption and question words, and the special tokens of Qwen2.5-VL. ``reader``: also the words that
    ``reader`` teaches, behind the others."""
    words, more = [*vocabulary(), *_question_words(), "<unk>"], _reader_words() if reader else ()
    tok = _tokenizer(words, [*SPECIAL, "<unk>"], pad="<|endoftext|>", end="<|im_end|>", more=more)
    tok.chat_template = CHAT_TEMPLATE
    return tok
