"""Trains Pocket: dense attention first with the indexer distilled beside it, then sparse, then quantised.

Owns the schedule. The dial is time: every phase is a share of `--total-seconds`, a run stops after
`--seconds` and goes on from its checkpoint in `--dir`. A run without one may begin with shipped weights
(`--from`), late in the schedule (`--start`), where the learning rate is low and the training quantised.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.pocket import FOLDER
from training.pocket.files.importing import load_shipped
from training.pocket.fit.batches import CONTEXT, KINDS, TRAINED, Batch, Feed, rows_of
from training.pocket.fit.live import Graphs, LiveWeights
from training.pocket.fit.optim import Optimizer
from training.pocket.network.model import Pocket
from training.pocket.network.moe import Router
from training.pocket.network.settings import Settings

SPARSE_FROM, QUANTISED_FROM, DECAY_FROM, CONTEXT_UNTIL = 0.5, 0.65, 0.45, 0.5
WARMUP_STEPS, BALANCE_RATE, LAST_FACTOR = 150, 1e-3, 0.02
MICRO_BATCHES = 2
TOKENS_OF_REFERENCE = 4000
DISTILLED_WIDTH, DISTILLED_ROWS, NOTICE_WEIGHT = 320, 1024, 0.3


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


def query_rows(marks: Tensor) -> Tensor | None:
    """Rows on which the indexer learns, learnt positions first; none where all is selected anyway."""
    count, width = marks.shape
    if width < DISTILLED_WIDTH:
        return None
    size = max(16, DISTILLED_ROWS // count)
    weights = torch.rand(marks.shape, device=marks.device) + (marks == TRAINED) * 0.35
    return weights.topk(min(size, width), sorted=False).indices


class Slot:
    """The fixed tensors of one width: what a captured pass reads and what it leaves behind."""

    def __init__(self, width: int, tokens: int, device: torch.device) -> None:
        rows = rows_of(width, tokens)
        share = 1.0 if width <= 128 else 0.5 if width <= 352 else 0.35
        self.ids = torch.zeros(rows, width, dtype=torch.long, device=device)
        self.marks = torch.zeros(rows, width, dtype=torch.uint8, device=device)
        self.places = torch.zeros(int(rows * width * share), dtype=torch.long, device=device)
        self.weights = torch.zeros(len(self.places), device=device)
        self.losses, self.right, self.distilled, self.noticed = (torch.zeros(()) for _ in range(4))

    def fill(self, batch: Batch, context_weight: float) -> None:
        """Copies a batch in; learnt places first, context places as far as there is room."""
        marks = batch.marks.ravel()
        learnt = np.flatnonzero(marks == TRAINED)[: len(self.places)]
        others = np.flatnonzero(marks == CONTEXT) if context_weight else learnt[:0]
        places = np.zeros(len(self.places), np.int64)
        weights = np.zeros(len(self.places), np.float32)
        count = min(len(places), len(learnt) + len(others))
        places[:count] = np.concatenate([learnt, others])[:count]
        weights[: len(learnt)] = 1.0
        weights[len(learnt) : count] = context_weight
        weights /= (max(len(learnt), 1) * TOKENS_OF_REFERENCE) ** 0.5
        self.ids.copy_(torch.from_numpy(batch.ids.astype(np.int64)))
        self.marks.copy_(torch.from_numpy(batch.marks))
        self.places.copy_(torch.from_numpy(places))
        self.weights.copy_(torch.from_numpy(weights))


class Meter:
    """Loss and rate of right tokens per kind since the last report."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, batch: Batch, slot: Slot) -> None:
        places = slot.places.cpu().numpy()
        learnt = (slot.weights > 0).cpu().numpy() & (batch.marks.ravel()[places] == TRAINED)
        losses, right = slot.losses.float().cpu().numpy(), slot.right.cpu().numpy()
        kinds = batch.kinds[places // batch.ids.shape[1]]
        for kind in np.unique(batch.kinds):
            mask = learnt & (kinds == kind)
            name = KINDS[kind] if KINDS[kind] != "needle" else f"needle{batch.ids.shape[1]}"
            entry = self.sums.setdefault(name, [0.0, 0.0, 0.0])
            entry[0] += float(losses[mask].sum())
            entry[1] += float(right[mask].sum())
            entry[2] += float(mask.sum())

    def report(self) -> str:
        parts = [
            f"{k} {s[0] / max(s[2], 1):.3f}/{100 * s[1] / max(s[2], 1):.1f}"
            for k, s in sorted(self.sums.items())
        ]
        self.sums.clear()
        return "  ".join(parts)


class Trainer:
    """One training run on one device."""

    def __init__(
        self, settings: Settings, feed: Feed, folder: Path, device: str, muon_lr: float, adam_lr: float
    ) -> None:
        torch.manual_seed(5)
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.feed, self.folder, self.device = feed, folder, torch.device(device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = Pocket(settings, dtype).to(self.device).train()
        self.optimizer = Optimizer(self.model, muon_lr, adam_lr)
        self.live = LiveWeights(self.model)
        self.graphs = Graphs(self.device)
        self.slots: dict[int, Slot] = {}
        self.routers = [m for m in self.model.modules() if isinstance(m, Router)]
        self.balance_rate = torch.tensor(BALANCE_RATE, device=self.device)
        self.worst_load = torch.zeros((), device=self.device)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.meter = Meter()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def begin(self, shipped: Path, seconds: float) -> None:
        """Starts with the shipped weights, as if `seconds` of the training were over."""
        self.model.load_state_dict(load_shipped(shipped, "cpu", self.model.c).state_dict())
        self.seconds = seconds
        self.live.refresh(False)

    def resume(self) -> None:
        """Goes on from the checkpoint."""
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        warm = "optimizer" in state
        if warm:
            self.optimizer.load(state["optimizer"])
        self.step = state["step"] if warm else 0
        self.seconds, self.tokens = state["seconds"], state["tokens"]
        self.live.refresh(False)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "settings": asdict(self.model.c),
            "optimizer": self.optimizer.state(),
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)

    def one_pass(self, slot: Slot, sparse: bool) -> None:
        """Forwards and backwards on what the slot holds."""
        hidden, p = self.model.hidden(slot.ids, sparse, query_rows(slot.marks))
        logits = self.model.logits(hidden.flatten(0, 1).index_select(0, slot.places))
        targets = slot.ids.roll(-1, 1).flatten()[slot.places]
        losses = F.cross_entropy(logits, targets, reduction="none")
        slot.losses = losses.detach()
        slot.right = logits.detach().argmax(-1) == targets
        loss = (losses * slot.weights).sum() / MICRO_BATCHES
        if p.distill_losses:
            distilled = torch.stack(p.distill_losses).sum()
            slot.distilled = distilled.detach()
            noticed = torch.stack(p.notice_losses).sum()
            slot.noticed = noticed.detach()
            loss = loss + distilled + NOTICE_WEIGHT * noticed
        self.live.backward(loss)

    @torch.no_grad()
    def update(self, quantised: bool) -> None:
        """One step of the optimisers, of the routers' balance, and the live weights brought up to date."""
        self.optimizer.step()
        self.worst_load.zero_()
        for router in self.routers:
            assert router.load is not None
            load = router.load.float()
            router.e_score_correction_bias += self.balance_rate * torch.sign(load.mean() - load)
            self.worst_load.copy_(torch.maximum(self.worst_load, load.max() / load.mean()))
            router.load.zero_()
        for parameter in self.live.parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()
        self.live.refresh(quantised)

    def train_step(self, stage: Stage, watch: bool) -> tuple[float, float]:
        """A step over some micro-batches; gives the indexer's two losses when watched."""
        distilled, noticed = 0.0, 0.0
        for _ in range(MICRO_BATCHES):
            batch = self.feed.next()
            width = batch.ids.shape[1]
            if width not in self.slots:
                self.slots[width] = Slot(width, self.feed.tokens, self.device)
            slot = self.slots[width]
            slot.fill(batch, stage.context_weight)
            sparse = stage.sparse and width > self.model.c.index_topk
            self.graphs.run((width, sparse), partial(self.one_pass, slot, sparse))
            self.tokens += batch.ids.size
            if watch:
                self.meter.add(batch, slot)
                distilled = max(distilled, slot.distilled.item())
                noticed = max(noticed, slot.noticed.item())
        self.optimizer.set_factor(stage.factor)
        self.balance_rate.fill_(BALANCE_RATE * max(stage.factor, 0.1))
        self.graphs.run(("update", stage.quantised), partial(self.update, stage.quantised))
        return distilled, noticed

    def report(self, stage: Stage, figures: str) -> None:
        head = f"step {self.step} p {stage.progress:.3f} {self.seconds:.0f}s {figures}"
        print(f"{head} load {self.worst_load.item():.1f} | {self.meter.report()}", flush=True)

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
            distilled, noticed = self.train_step(stage, watch=self.step % 10 == 0)
            if self.step % report_every == 0:
                rate = (self.tokens - first_tokens) / max(time.monotonic() - start, 1e-9)
                self.report(stage, f"{rate / 1e3:.0f}k/s kl {distilled:.2f} hinge {noticed:.2f}")
            self.step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--total-seconds", type=float, default=1000)
    parser.add_argument("--dir", type=Path, default=Path("pocket-run"))
    parser.add_argument("--from", dest="shipped", type=Path, help="a folder of shipped files to begin with")
    parser.add_argument("--start", type=float, default=0.0, help="share of the schedule to begin at")
    parser.add_argument("--tokenizer", type=Path, default=FOLDER / "tokenizer.json")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens in a micro-batch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny geometry, to try the script")
    parser.add_argument("--experts", type=int, default=Settings.n_routed_experts, help="of each layer")
    parser.add_argument("--expert-width", type=int, default=Settings.moe_intermediate_size)
    parser.add_argument("--sources", type=Path, help="a folder of Python sources to learn as well")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--report-every", type=int, default=100)
    args = parser.parse_args()
    feed = Feed(args.tokenizer, args.workers, int(time.time()) % 100_000, args.tokens, args.sources)
    settings = Settings(n_routed_experts=args.experts, moe_intermediate_size=args.expert_width)
    if args.small:
        settings = Settings(hidden_size=64, n_routed_experts=8, num_experts_per_tok=2)
    trainer = Trainer(settings, feed, args.dir, args.device, args.muon_lr, args.adam_lr)
    if trainer.checkpoint.exists():
        trainer.resume()
    elif args.shipped:
        trainer.begin(args.shipped, args.start * args.total_seconds)
    trainer.run(args.seconds, args.total_seconds, args.report_every)
    feed.close()
    trainer.save()
    print(
        f"stopped at step {trainer.step}, {trainer.seconds:.0f} s, {trainer.tokens / 1e6:.0f} M tokens",
        flush=True,
    )


if __name__ == "__main__":
    main()
