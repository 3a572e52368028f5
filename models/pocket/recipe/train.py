"""Trains Pocket: dense attention first with the indexer distilled beside it, then sparse, then quantised.

Owns the schedule. The dial is time: every phase is a share of `--total-seconds`, a run stops after `--seconds`
and goes on from its checkpoint in `--dir`.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.pocket.recipe.batches import CONTEXT, KINDS, TRAINED, Batch, Feed
from models.pocket.recipe.model import Pocket
from models.pocket.recipe.moe import Router
from models.pocket.recipe.optim import Optimizer
from models.pocket.recipe.settings import Settings

SPARSE_FROM, QUANTISED_FROM, DECAY_FROM, CONTEXT_UNTIL = 0.45, 0.62, 0.5, 0.5
WARMUP_STEPS, BALANCE_RATE, LAST_FACTOR = 150, 1e-3, 0.02
MICRO_BATCHES = 2
TOKENS_OF_REFERENCE = 8000
DISTILLED_WIDTH = 320


@dataclass
class Stage:
    """What a moment of the training asks for."""

    progress: float
    step: int

    @property
    def sparse(self) -> bool:
        return self.progress >= SPARSE_FROM

    @property
    def quantised(self) -> bool:
        return self.progress >= QUANTISED_FROM

    @property
    def context_weight(self) -> float:
        return 0.3 if self.progress < CONTEXT_UNTIL else 0.0

    @property
    def factor(self) -> float:
        """The learning rates' factor: warm-up, constant, linear decay."""
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        left = min(1.0, (1 - self.progress) / (1 - DECAY_FROM))
        return warm * max(LAST_FACTOR, left)


def query_rows(marks: Tensor, device: torch.device) -> Tensor | None:
    """Rows on which the indexer learns, learnt positions first; none where every position is selected anyway."""
    count, width = marks.shape
    if width < DISTILLED_WIDTH:
        return None
    size = max(48, min(512, 4096 // count))
    weights = torch.rand(marks.shape, device=device) + (marks == TRAINED) * 0.35
    return weights.topk(min(size, width), sorted=False).indices


def micro_loss(model: Pocket, batch: Batch, stage: Stage, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The language loss and the indexer's loss of one batch."""
    ids = torch.from_numpy(batch.ids).to(device, non_blocking=True).long()
    marks = torch.from_numpy(batch.marks).to(device, non_blocking=True)
    hidden, p = model.hidden(ids, stage.sparse, query_rows(marks, device))
    keep = batch.marks == TRAINED if stage.context_weight == 0 else batch.marks > 0
    places = torch.from_numpy(np.flatnonzero(keep)).to(device)
    logits = model.logits(hidden.flatten(0, 1)[places])
    targets = ids.roll(-1, 1).flatten()[places]
    losses = F.cross_entropy(logits, targets, reduction="none")
    learnt = marks.flatten()[places] == TRAINED
    weights = torch.where(learnt, 1.0, stage.context_weight)
    num_learnt = int((batch.marks == TRAINED).sum())
    loss = (losses * weights).sum() / (num_learnt * TOKENS_OF_REFERENCE) ** 0.5
    distilled = torch.stack(p.distill_losses).sum() if p.distill_losses else torch.zeros((), device=device)
    seen = {"losses": losses, "learnt": learnt, "places": places, "right": logits.argmax(-1) == targets}
    return loss, distilled, seen


class Meter:
    """Loss and rate of right tokens per kind since the last report."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, batch: Batch, seen: dict[str, Any]) -> None:
        rows = seen["places"].cpu().numpy() // batch.ids.shape[1]
        learnt, losses = seen["learnt"].cpu().numpy(), seen["losses"].detach().float().cpu().numpy()
        right = seen["right"].cpu().numpy()
        for kind in np.unique(batch.kinds):
            mask = learnt & (batch.kinds[rows] == kind)
            name = KINDS[kind] if KINDS[kind] != "needle" else f"needle{batch.ids.shape[1]}"
            entry = self.sums.setdefault(name, [0.0, 0.0, 0.0])
            entry[0] += float(losses[mask].sum())
            entry[1] += float(right[mask].sum())
            entry[2] += float(mask.sum())

    def report(self) -> str:
        parts = [f"{k} {s[0] / max(s[2], 1):.3f}/{100 * s[1] / max(s[2], 1):.1f}" for k, s in sorted(self.sums.items())]
        self.sums.clear()
        return "  ".join(parts)


class Trainer:
    """One training run on one device."""

    def __init__(self, settings: Settings, feed: Feed, folder: Path, device: str, muon_lr: float, adam_lr: float) -> None:
        torch.manual_seed(5)
        self.feed, self.folder, self.device = feed, folder, torch.device(device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = Pocket(settings, dtype).to(self.device)
        self.optimizer = Optimizer(self.model, muon_lr, adam_lr)
        self.routers = [m for m in self.model.modules() if isinstance(m, Router)]
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.meter = Meter()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def resume(self) -> None:
        """Goes on from the checkpoint if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        if "optimizer" in state:
            self.optimizer.load(state["optimizer"])
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state(), "step": self.step,
                 "seconds": self.seconds, "tokens": self.tokens}  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)

    def train_step(self, stage: Stage, watch: bool) -> tuple[float, float]:
        """A step over some micro-batches; gives the indexer's loss and the worst load when watched."""
        self.model.set_quantised(stage.quantised)
        loads: dict[Router, Tensor] = {}
        distilled_sum = 0.0
        for _ in range(MICRO_BATCHES):
            batch = self.feed.next()
            loss, distilled, seen = micro_loss(self.model, batch, stage, self.device)
            (loss / MICRO_BATCHES + distilled).backward()
            for router in self.routers:
                assert router.load is not None
                loads[router] = loads[router] + router.load if router in loads else router.load
            self.tokens += batch.ids.size
            if watch:
                self.meter.add(batch, seen)
                distilled_sum += distilled.item()
        self.optimizer.step(stage.factor)
        worst = 0.0
        for router, load in loads.items():
            drift = torch.sign(load.float().mean() - load.float())
            router.e_score_correction_bias += BALANCE_RATE * max(stage.factor, 0.1) * drift
        if watch:
            worst = max((load.max() / load.float().mean()).item() for load in loads.values())
        return distilled_sum, worst

    def run(self, seconds: float, total_seconds: float, report_every: int) -> None:
        """Trains for `seconds`, or until the whole training's time is over."""
        start, before, first_tokens = time.monotonic(), self.seconds, self.tokens
        while True:
            elapsed = time.monotonic() - start
            self.seconds = before + elapsed
            stage = Stage(min(1.0, self.seconds / total_seconds), self.step)
            self.feed.progress.value = stage.progress
            if elapsed >= seconds or stage.progress >= 1.0:
                break
            watch = self.step % 5 == 0
            distilled, worst = self.train_step(stage, watch)
            if self.step % report_every == 0:
                rate = (self.tokens - first_tokens) / max(time.monotonic() - start, 1e-9)
                waiting = self.feed.queue.qsize()
                print(f"step {self.step} p {stage.progress:.3f} {self.seconds:.0f}s {rate / 1e3:.0f}k/s q{waiting} kl {distilled:.2f} "
                      f"load {worst:.1f} | {self.meter.report()}", flush=True)  # fmt: skip
            self.step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--total-seconds", type=float, default=1000)
    parser.add_argument("--dir", type=Path, default=Path("pocket-run"))
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parents[1] / "tokenizer.json")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens in a micro-batch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny geometry, to try the script")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--report-every", type=int, default=100)
    args = parser.parse_args()
    feed = Feed(args.tokenizer, args.workers, int(time.time()) % 100_000, args.tokens)
    settings = Settings(hidden_size=64, n_routed_experts=8, num_experts_per_tok=2) if args.small else Settings()
    trainer = Trainer(settings, feed, args.dir, args.device, args.muon_lr, args.adam_lr)
    trainer.resume()
    trainer.run(args.seconds, args.total_seconds, args.report_every)
    feed.close()
    trainer.save()
    print(f"stopped at step {trainer.step}, {trainer.seconds:.0f} s, {trainer.tokens / 1e6:.0f} M tokens", flush=True)


if __name__ == "__main__":
    main()
