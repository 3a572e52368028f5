"""Generates, tokenises and batches the training data in worker processes, in buckets of like length.

Owns the workers and the queue. A batch is rows of one width, each a conversation of its own from position 0.
"""

import multiprocessing as mp
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training.pocket.data.chat import VOCABULARY
from training.pocket.data.mixture import draw_sample
from training.pocket.data.pools import Pools
from training.pocket.data.render import render
from training.pocket.data.sample import Sample
from training.pocket.fit.tokenizer import token_id

WIDTHS = (64, 96, 128, 192, 256, 352, 512, 768, 1152, 1536, 2304, 3072, 4352)
KINDS = (
    "arithmetic",
    "facts",
    "chat",
    "echo",
    "turns",
    "json",
    "tool_call",
    "no_call",
    "tool_result",
    "needle",
    "sources",
)
TRAINED, CONTEXT = 1, 2
CONTEXT_SHARE = 0.12
# Of rows; their rows are long, so of tokens it is about half. A third of them is learnt in one pass.
SOURCES_SHARE, SOURCES_WIDTHS, SOURCES_LEARNT = 0.15, (512, 1152, 2304), 0.33
CHARACTERS_PER_TOKEN = 6  # more than any source has


@dataclass
class Batch:
    """Token ids [B, L]; for each position whether its NEXT token is learnt; the kind of each row."""

    ids: NDArray[np.int16]
    marks: NDArray[np.uint8]
    kinds: NDArray[np.uint8]


def encode(
    tokenizer: Tokenizer, sample: Sample, rng: np.random.Generator
) -> tuple[list[int], NDArray[np.uint8]]:
    """Ids, and marks aligned to the position before each learnt token."""
    ids: list[int] = []
    learnt: list[bool] = []
    ends = False
    for part in render(sample):
        piece = tokenizer.encode(part.text, add_special_tokens=False).ids
        learnt += [part.trained] * len(piece)
        if ends and piece and not part.trained:
            learnt[len(ids)] = True
        ids += piece
        ends = part.trained
    own = np.array([*learnt[1:], False])
    context = ~own & (rng.random(len(own)) < CONTEXT_SHARE)
    context[-1] = False
    return ids, np.where(own, TRAINED, np.where(context, CONTEXT, 0)).astype(np.uint8)


class Sources:
    """Windows of the Python files in a folder."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
        self._paths = sorted(folder.rglob("*.py"))
        self._tokenizer, self._rng = tokenizer, rng

    def draw(self) -> tuple[list[int], NDArray[np.uint8]]:
        """Ids and marks of one window that fills a width."""
        width = int(self._rng.choice(SOURCES_WIDTHS))
        while True:
            path = self._paths[self._rng.integers(len(self._paths))]
            text = path.read_text(encoding="utf-8", errors="ignore")
            start = int(self._rng.integers(0, max(1, len(text) - width * CHARACTERS_PER_TOKEN)))
            window = text[start : start + width * CHARACTERS_PER_TOKEN]
            ids = self._tokenizer.encode(window, add_special_tokens=False).ids[:width]
            if len(ids) == width:
                learnt = self._rng.random(width) < SOURCES_LEARNT
                learnt[-1] = False
                return ids, np.where(learnt, TRAINED, 0).astype(np.uint8)


def rows_of(width: int, tokens: int) -> int:
    """Rows of a batch of this width."""
    return max(1, round(tokens / width))


def assemble(rows: list[tuple[list[int], NDArray[np.uint8], int]], width: int, pad: int) -> Batch:
    ids = np.full((len(rows), width), pad, np.int16)
    marks = np.zeros((len(rows), width), np.uint8)
    for index, (row, mark, _) in enumerate(rows):
        ids[index, : len(row)] = row
        marks[index, : len(row)] = mark
    return Batch(ids, marks, np.array([row[2] for row in rows], np.uint8))


def work(
    queue: "mp.Queue[Batch]",
    progress: "Synchronized[float]",
    seed: int,
    path: str,
    tokens: int,
    folder: Path | None,
) -> None:
    """One worker: fills buckets for ever and hands out each that is full."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(path)
    VOCABULARY.extend(text for text in tokenizer.get_vocab() if text.isascii() and text.isalpha())
    pad = token_id(tokenizer, "<|endoftext|>")
    pools, rng = Pools(random.Random(seed)), np.random.default_rng(seed)
    sources = Sources(folder, tokenizer, rng) if folder else None
    buckets: dict[int, list[tuple[list[int], NDArray[np.uint8], int]]] = defaultdict(list)
    while True:
        if sources and rng.random() < SOURCES_SHARE:
            kind, (ids, marks) = "sources", sources.draw()
        else:
            sample = draw_sample(pools, progress.value)
            kind, (ids, marks) = sample.kind, encode(tokenizer, sample, rng)
        if len(ids) > WIDTHS[-1]:
            continue
        width = next(w for w in WIDTHS if w >= len(ids))
        bucket = buckets[width]
        bucket.append((ids, marks, KINDS.index(kind)))
        if len(bucket) == rows_of(width, tokens):
            queue.put(assemble(bucket, width, pad))
            bucket.clear()


class Feed:
    """The worker processes and their queue. Start it before anything touches the GPU."""

    def __init__(
        self, tokenizer: Path, workers: int, seed: int, tokens: int, sources: Path | None = None
    ) -> None:
        self.tokens = tokens
        context = mp.get_context("fork")
        self.queue: mp.Queue[Batch] = context.Queue(maxsize=48)
        self.progress: Synchronized[float] = context.Value("d", 0.0)
        arguments = [
            (self.queue, self.progress, seed * 1000 + i, str(tokenizer), tokens, sources)
            for i in range(workers)
        ]
        self.workers = [context.Process(target=work, args=a, daemon=True) for a in arguments]
        for worker in self.workers:
            worker.start()

    def next(self) -> Batch:
        return self.queue.get()

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()
