"""The word-level tokenizer of the toy world: exactly the words that captions and prompts can contain.

Caption words come first, so that ids below `caption_vocabulary_size()` are all that a caption needs. It is a plain
`PreTrainedTokenizerFast`; nothing of ours is needed to load it again.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from training.toybox.captions import CAPTION_TOKENS, caption_phrases
from training.toybox.prompts import prompt_phrases

_SPECIAL = ["<pad>", "</s>", "<unk>"]


def caption_vocabulary_size() -> int:
    """How many ids, special ones included, captions are made of."""
    return len(_SPECIAL) + len(_words(caption_phrases()))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Ids: <pad> 0, </s> 1, <unk> 2, then caption words, then the words only prompts use."""
    caption_words = _words(caption_phrases())
    words = _SPECIAL + caption_words + [word for word in _words(prompt_phrases()) if word not in caption_words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    # No word starts with "##": this decoder only puts spaces between words and none before a comma or full stop.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=CAPTION_TOKENS,
    )


def _words(phrases: list[str]) -> list[str]:
    return sorted({word for phrase in phrases for word in re.findall(r"[a-z]+|[,.]", phrase)})
