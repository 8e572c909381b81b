"""ToyWorld's tokenizers: one word, one token. Saved as ``tokenizer.json``, so that ``AutoTokenizer`` loads them as it
does the real ones."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowmem_drf.questions import toyworld
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


def _tokenizer(
    words: list[str], special: list[str], pad: str, end: str, add_end: bool = False
) -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(dict.fromkeys([*special, *sorted(set(words))]))}
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


def critic_tokenizer() -> PreTrainedTokenizerFast:
    """For the critic: caption and question words, and the special tokens of Qwen2.5-VL."""
    tok = _tokenizer(
        [*vocabulary(), *_question_words(), "<unk>"], [*SPECIAL, "<unk>"], pad="<|endoftext|>", end="<|im_end|>"
    )
    tok.chat_template = CHAT_TEMPLATE
    return tok
