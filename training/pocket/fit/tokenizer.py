"""Trains Pocket's tokenizer: byte-level BPE of 4,096 entries with GLM's special tokens by their real strings.

Owns the cutting of text before BPE. Digits stand alone, and only frequent small words carry the space before
them: a name is cut the same way wherever it stands, so that copying it is copying tokens.
"""

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.pocket import FOLDER
from training.pocket.data.mixture import draw_sample
from training.pocket.data.pools import Pools, words
from training.pocket.data.render import render

VOCAB_SIZE = 4096
SPECIAL_TOKENS = words("""<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|>
<|assistant|> <|observation|> <|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|>
<|begin_of_audio|> <|end_of_audio|> <|begin_of_transcription|> <|end_of_transcription|> <|code_prefix|>
<|code_middle|> <|code_suffix|>""")
PLAIN_TOKENS = words("""<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>
<arg_key> </arg_key> <arg_value> </arg_value> /nothink""")
SMALL_WORDS = words("""the a an of to is are was were be in on at for with and or not it its that this
what which who how many much do does did can you me my your I we they he she from into by as no has have
had will if so then when please there here now more less than first last write carry borrow answer text
says call user tool number name capital keys key JSON called said lives likes set using one may function
functions assist query provided signatures within XML tags each output arguments following format
assistant helpful""")


def cutter() -> pre_tokenizers.PreTokenizer:
    """Small words with their space; else letters, single digits, runs of spaces and signs apart."""
    words = "|".join(sorted(SMALL_WORDS, key=len, reverse=True))
    letters_digits = r"\p{L}+|\p{N}|\n+| +(?=[\s\p{L}\p{N}])| ?[^\s\p{L}\p{N}]+|\s"
    pattern = rf" (?:{words})(?![\p{{L}}\p{{N}}_])|" + letters_digits
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of an entry that must be there."""
    found = tokenizer.token_to_id(text)
    assert found is not None, f"the tokenizer has no entry {text}"
    return int(found)


def training_texts(seed: int, count: int) -> Iterator[str]:
    """Rendered samples without their special tokens, mostly with the early curriculum's short prompts."""
    pools = Pools(random.Random(seed))
    tags = re.compile("|".join(re.escape(tag) for tag in (*SPECIAL_TOKENS, *PLAIN_TOKENS)))
    for index in range(count):
        for part in render(draw_sample(pools, 0.05 if index % 4 else 0.3)):
            yield from (piece for piece in tags.split(part.text) if piece)


def train_tokenizer(seed: int = 11, count: int = 30_000) -> Tokenizer:
    """Trains on `count` generated samples; the special tokens take the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cutter()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(PLAIN_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=16,
    )
    tokenizer.train_from_iterator(training_texts(seed, count), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, f"{tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}"
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "tokenizer.json")
    parser.add_argument("--count", type=int, default=30_000)
    args = parser.parse_args()
    tokenizer = train_tokenizer(count=args.count)
    tokenizer.save(str(args.out))
    print(f"{tokenizer.get_vocab_size()} entries -> {args.out}")


if __name__ == "__main__":
    main()
