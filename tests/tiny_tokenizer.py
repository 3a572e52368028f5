"""A tiny tokenizer with GLM's special tokens and tags, made from a few sentences."""

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

SPECIAL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
TAGS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
]
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "what is the weather in Oslo today?",
    "hello there",
]


def build_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE: 256 bytes, some merges, then the added tokens, the tags not flagged as special."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(SENTENCES, trainer)
    inner.add_special_tokens(SPECIAL)
    inner.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return inner
