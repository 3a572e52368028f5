"""Greedy decoding in torch, many prompts at a time, for the evaluation beside the training.

Owns the caches: rows are padded on the right and each writes at its own position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.pocket.network.model import LayerCache, Pocket

STEP = 64


@dataclass
class Request:
    """A prompt in ids and the most tokens to add to it."""

    ids: list[int]
    max_new: int


def make_caches(model: Pocket, rows: int, length: int) -> list[LayerCache]:
    """Empty caches of all layers; shared layers have no index keys."""
    c, device, dtype = model.c, model.lm_head.weight.device, model.dtype
    caches = []
    for kind in c.indexer_types:
        index = torch.zeros(rows, length, c.index_head_dim, device=device) if kind == "full" else None
        latent = torch.zeros(rows, length, c.kv_lora_rank, device=device, dtype=dtype)
        caches.append(LayerCache(latent, torch.zeros(rows, length, c.qk_rope_head_dim, device=device), index))
    return caches


@torch.no_grad()
def decode_group(model: Pocket, requests: list[Request], stop: set[int]) -> list[list[int]]:
    """Decodes requests of like length together."""
    device = model.lm_head.weight.device
    width = max(len(r.ids) for r in requests)
    width += -width % STEP
    max_new = max(r.max_new for r in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    for row, request in enumerate(requests):
        ids[row, : len(request.ids)] = torch.tensor(request.ids)
    caches = make_caches(model, len(requests), width + max_new + (-max_new % STEP))
    hidden, _ = model.hidden(ids.to(device), sparse=True, caches=caches)
    position = torch.tensor([len(r.ids) for r in requests], device=device)
    token = model.logits(hidden[torch.arange(len(requests)), position - 1]).argmax(-1)
    return decode_on(model, token, position, caches, max_new, stop)


def decode_on(
    model: Pocket, token: Tensor, position: Tensor, caches: list[LayerCache], max_new: int, stop: set[int]
) -> list[list[int]]:
    """Token by token until every row has stopped."""
    slots = torch.arange(caches[0].latent.shape[1], device=token.device)
    ends = torch.tensor(sorted(stop), device=token.device)
    done = torch.zeros_like(token, dtype=torch.bool)
    outputs = [token]
    for step in range(max_new - 1):
        done |= torch.isin(token, ends)
        if step % 8 == 0 and bool(done.all()):
            break
        mask = (slots <= position[:, None]).unsqueeze(1)
        hidden, _ = model.hidden(
            token[:, None], sparse=True, caches=caches, positions=position, key_mask=mask
        )
        token = model.logits(hidden[:, 0]).argmax(-1)
        outputs.append(token)
        position = position + 1
    return [cut(row, stop) for row in torch.stack(outputs, 1).tolist()]


def cut(ids: list[int], stop: set[int]) -> list[int]:
    """The ids up to and with the first that stops."""
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids) - 1)
    return ids[: end + 1]


def decode_all(
    model: Pocket, requests: list[Request], stop: set[int], tokens: int = 120_000
) -> list[list[int]]:
    """Decodes all requests in groups of like length that fit `tokens`."""
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].ids))
    results: list[list[int]] = [[] for _ in requests]
    while order:
        size = 1
        while size < min(len(order), 512) and (len(requests[order[size]].ids) + 256) * (size + 1) <= tokens:
            size += 1
        group, order = order[:size], order[size:]
        for index, ids in zip(group, decode_group(model, [requests[i] for i in group], stop), strict=True):
            results[index] = ids
    return results
