"""ToyWorld's tokenizers: one word, one token. Saved as ``tokenizer.json``, so that ``AutoTokenizer`` loads them as it does the real ones."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowmem_drf.method.questions.toyworld import ALIGNMENT, GLOBAL, PHYSICS, QUALITY
from lowmem_drf.toy.captions import vocabulary

OPEN_QUESTIONS = ("what color is it ?", "what form is it ?", "where does it move ?", "what is the background ?", "what is wrong ?", "describe the clip .")
"""Free-form questions the critic learns besides the yes/no ones."""

ANSWER_WORDS = "yes no nothing it jumps shakes vanishes changes form size color the clip is noisy blurry light flickers and thing something else wrong with"

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'user' %}<|im_end|>{% endif %}{% endfor %}"
)


def _question_words() -> list[str]:
    pairs = [*ALIGNMENT.values(), *PHYSICS.values(), *QUALITY.values(), GLOBAL]
    text = " ".join([*(q for pair in pairs for q in pair), *OPEN_QUESTIONS])
    return [w for w in [*text.replace("{value}", "").replace("{caption}", "").split(), *ANSWER_WORDS.split()] if w]


def _tokenizer(words: list[str], special: list[str], pad: str, end: str, add_end: bool = False) -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(dict.fromkeys([*special, *sorted(set(words))]))}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if add_end:
        tok.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, vocab[end])])
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", pad_token=pad, eos_token=end, additional_special_tokens=special)


def text_tokenizer() -> PreTrainedTokenizerFast:
    """For the UMT5 encoder: caption words, ``</s>`` at the end, padded with ``<pad>``."""
    return _tokenizer(vocabulary(), ["<pad>", "</s>", "<unk>"], pad="<pad>", end="</s>", add_end=True)


def critic_tokenizer() -> PreTrainedTokenizerFast:
    """For the critic: caption and question words, and the special tokens of Qwen2.5-VL."""
    tok = _tokenizer([*vocabulary(), *_question_words(), "<unk>"], [*SPECIAL, "<unk>"], pad="<|endoftext|>", end="<|im_end|>")
    tok.chat_template = CHAT_TEMPLATE
    return tok
