"""GLM-5.2's architecture in torch, for training, with the names of the Hugging Face checkpoint.

Owns attention (MLA), the indexer and its distillation, and the whole stack. The experts are in moe.py.
Checked against transformers' GlmMoeDsaForCausalLM by check_parity.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.pocket.network.moe import MoE
from training.pocket.network.mutants import MUTANTS, notice_loss
from training.pocket.network.parts import MLP, Lookup, PlainNorm, QuantLinear, rotary_table, rotate
from training.pocket.network.quant import rounded
from training.pocket.network.settings import Settings

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class LayerCache:
    """What decoding keeps of one layer, rows padded on the right."""

    latent: Tensor  # [B, T, kv_lora]
    k_rope: Tensor  # [B, T, rope]
    index_k: Tensor | None  # [B, T, index_dim]


@dataclass
class Pass:
    """What one forward pass carries from layer to layer."""

    cos: Tensor
    sin: Tensor
    sparse: bool
    key_mask: Tensor | None = None  # [B, Q, T] while decoding
    positions: Tensor | None = None  # [B] where decoding writes
    caches: list[LayerCache] | None = None
    query_rows: Tensor | None = None  # [B, S] rows on which the indexer is trained
    bias: Tensor | None = None  # [B, 1, Q, T], the selection of the last full layer
    student: Tensor | None = None
    mutated: list[Tensor] = field(default_factory=list)
    teacher: Tensor | None = None
    distill_losses: list[Tensor] = field(default_factory=list)
    notice_losses: list[Tensor] = field(default_factory=list)


class Indexer(nn.Module):
    """Scores all earlier positions for each query; the best `index_topk` are attended to."""

    def __init__(self, c: Settings) -> None:
        super().__init__()
        self.c = c
        self.wq_b = QuantLinear(c.q_lora_rank, c.index_n_heads * c.index_head_dim)
        self.wk = QuantLinear(c.hidden_size, c.index_head_dim)
        self.k_norm = nn.LayerNorm(c.index_head_dim, eps=1e-6)
        self.weights_proj = QuantLinear(c.hidden_size, c.index_n_heads)

    def quick_scores(self, q: Tensor, k: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The same in the training's precision, queries in chunks and the heads in one product."""
        rows = max(1, 2**27 // (q.shape[0] * q.shape[2] * k.shape[1]))
        keys = (k * self.c.index_head_dim**-0.5).to(dtype).transpose(1, 2).unsqueeze(1)  # [B, 1, D, T]
        pieces = []
        for part, weight in zip(
            q.to(dtype).split(rows, 1), weights.to(dtype).unsqueeze(2).split(rows, 1), strict=True
        ):
            products = (part.flatten(1, 2) @ keys.squeeze(1)).unflatten(1, part.shape[1:3])  # [B, Q, H, T]
            pieces.append((weight @ F.relu(products)).squeeze(2))
        return torch.cat(pieces, 1).float()

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, passed = x.split(
            [self.c.qk_rope_head_dim, self.c.index_head_dim - self.c.qk_rope_head_dim], -1
        )
        return torch.cat([rotate(turned, cos, sin), passed], -1)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor, turn: Turn | None = None) -> Tensor:
        k = self.wk(x).float()
        normed = F.layer_norm(k, (self.c.index_head_dim,), self.k_norm.weight, self.k_norm.bias, 1e-6)
        return (turn or self.rotated)(normed, cos, sin)  # [B, T, D]

    def queries(self, q_resid: Tensor, cos: Tensor, sin: Tensor, turn: Turn | None = None) -> Tensor:
        q = self.wq_b(q_resid).unflatten(-1, (self.c.index_n_heads, -1)).float()
        return (turn or self.rotated)(q, cos.unsqueeze(-2), sin.unsqueeze(-2))  # [B, Q, H, D]

    def head_weights(self, x: Tensor) -> Tensor:
        return self.weights_proj(x).float() * self.c.index_n_heads**-0.5

    def scores(self, q: Tensor, k: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, Q, T], summed head by head in float32 to keep the largest tensor small."""
        total: Tensor | None = None
        keys = k.to(dtype).transpose(1, 2)
        for head in range(self.c.index_n_heads):
            scaled = (q[:, :, head] * self.c.index_head_dim**-0.5).to(dtype)
            part = F.relu(scaled @ keys).float() * weights[:, :, head, None]
            total = part if total is None else total + part
        assert total is not None
        return total


class Attention(nn.Module):
    """Multi-head latent attention over the selected positions."""

    def __init__(self, c: Settings, layer: int) -> None:
        super().__init__()
        self.c, self.layer = c, layer
        heads = c.num_attention_heads
        self.q_a_proj = QuantLinear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = PlainNorm(c.q_lora_rank, 1e-6)
        self.q_b_proj = QuantLinear(c.q_lora_rank, heads * (c.qk_nope_head_dim + c.qk_rope_head_dim))
        self.kv_a_proj_with_mqa = QuantLinear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = PlainNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = QuantLinear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = QuantLinear(heads * c.v_head_dim, c.hidden_size)
        self.indexer = Indexer(c) if c.indexer_types[layer] == "full" else None
        self.scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5

    def kv_b_weight(self) -> Tensor:
        linear = self.kv_b_proj
        if linear.live is not None or not linear.quantised:
            return linear.effective()
        return linear.weight + (self.quantised_kv_b() - linear.weight).detach()

    @torch.no_grad()
    def quantised_kv_b(self) -> Tensor:
        """kv_b as its two quantised halves give it: the key half is quantised transposed, per head."""
        c, bits, weight = self.c, self.kv_b_proj.bits, self.kv_b_proj.weight
        key, value = weight.view(c.num_attention_heads, -1, c.kv_lora_rank).split(
            [c.qk_nope_head_dim, c.v_head_dim], 1
        )
        key = rounded(key.transpose(1, 2).contiguous(), bits, min(64, c.qk_nope_head_dim)).transpose(1, 2)
        return torch.cat([key, rounded(value.contiguous(), bits, 64)], 1).reshape(weight.shape)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, T, nope + rope] and values [B, H, T, v] from the latents."""
        c = self.c
        both = F.linear(latent, self.kv_b_weight().to(latent.dtype)).unflatten(
            -1, (c.num_attention_heads, -1)
        )
        nope, value = both.transpose(1, 2).split([c.qk_nope_head_dim, c.v_head_dim], -1)
        rope = k_rope.to(nope.dtype).unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)
        return torch.cat([nope, rope], -1), value

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        c, dtype = self.c, x.dtype
        q_resid = self.q_a_layernorm(self.q_a_proj(x)).to(dtype)
        q = self.q_b_proj(q_resid).unflatten(-1, (c.num_attention_heads, -1))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_rope = rotate(q_rope.float(), p.cos.unsqueeze(-2), p.sin.unsqueeze(-2)).to(dtype)
        q = torch.cat([q_nope, q_rope], -1).transpose(1, 2)  # [B, H, Q, D]
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = self.kv_a_layernorm(latent).to(dtype)
        k_rope = rotate(k_rope.float(), p.cos, p.sin)
        cache = p.caches[self.layer] if p.caches is not None else None
        if cache is not None:
            latent, k_rope = store(cache.latent, latent, p), store(cache.k_rope, k_rope, p)
        keys, values = self.expand(latent.to(dtype), k_rope)
        if self.indexer is not None:
            self.select(x, q_resid, p, cache)
        if p.query_rows is not None:
            self.distill(q, keys, p)
        out = attend(q, keys, values, self.scale, p.bias)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def select(self, x: Tensor, q_resid: Tensor, p: Pass, cache: LayerCache | None) -> None:
        """Sets the selection for this layer and the shared layers after it; studies the indexer."""
        indexer, c = self.indexer, self.c
        assert indexer is not None
        finish_distillation(p)
        x, q_resid = x.detach(), q_resid.detach()
        keys = indexer.keys(x, p.cos, p.sin)
        if cache is not None and cache.index_k is not None:
            keys = store(cache.index_k, keys, p)
        if p.query_rows is not None:
            self.study(x, q_resid, p.query_rows, keys, p)
        p.bias = None
        if (keys.shape[1] > c.index_topk and p.sparse) or p.key_mask is not None:
            with torch.no_grad():
                p.bias = selection(indexer, x, q_resid, keys, p, c.index_topk)

    def study(self, x: Tensor, q_resid: Tensor, rows: Tensor, keys: Tensor, p: Pass) -> None:
        """The indexer's scores on the chosen rows: as they are, and with each mutant's rotation."""
        indexer = self.indexer
        assert indexer is not None
        cos, sin, picked = p.cos[0][rows], p.sin[0][rows], take_rows(q_resid, rows)
        weights = indexer.head_weights(take_rows(x, rows))
        scores = indexer.quick_scores(indexer.queries(picked, cos, sin), keys, weights, x.dtype)
        p.student = scores.masked_fill(later_than(rows, keys.shape[1]), float("-inf"))
        p.mutated = []
        for turn in MUTANTS:
            q, k = indexer.queries(picked, cos, sin, turn), indexer.keys(x, p.cos, p.sin, turn)
            p.mutated.append(indexer.quick_scores(q, k, weights, x.dtype))

    @torch.no_grad()
    def distill(self, q: Tensor, keys: Tensor, p: Pass) -> None:
        """Adds this layer's dense attention on the chosen rows to the indexer's target."""
        assert p.query_rows is not None
        rows = p.query_rows
        index = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        logits = (q.gather(2, index) @ keys.transpose(2, 3)).float() * self.scale
        logits = logits.masked_fill(later_than(rows, keys.shape[2]).unsqueeze(1), float("-inf"))
        mass = logits.softmax(-1).mean(1)
        p.teacher = mass if p.teacher is None else p.teacher + mass


def store(buffer: Tensor, fresh: Tensor, p: Pass) -> Tensor:
    """Writes the new rows into the cache and gives back all that is needed of it."""
    if p.positions is None:
        buffer[:, : fresh.shape[1]] = fresh.to(buffer.dtype)
        return fresh
    buffer[torch.arange(len(buffer), device=buffer.device), p.positions] = fresh[:, 0].to(buffer.dtype)
    return buffer


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def later_than(rows: Tensor, length: int) -> Tensor:
    """[B, S, T]: the positions that come after each row."""
    return torch.arange(length, device=rows.device) > rows.unsqueeze(-1)


def selection(indexer: Indexer, x: Tensor, q_resid: Tensor, keys: Tensor, p: Pass, topk: int) -> Tensor:
    """Zero at the chosen positions and minus infinity elsewhere, [B, 1, Q, T]."""
    length = keys.shape[1]
    allowed = p.key_mask
    if allowed is None:
        allowed = torch.ones(x.shape[1], length, dtype=torch.bool, device=x.device).tril()
    if length > topk:
        score = indexer.quick_scores if indexer.training else indexer.scores
        scores = score(indexer.queries(q_resid, p.cos, p.sin), keys, indexer.head_weights(x), x.dtype)
        best = scores.masked_fill_(~allowed, float("-inf")).topk(topk, sorted=False).indices
        chosen = torch.zeros(scores.shape, dtype=torch.bool, device=x.device).scatter_(-1, best, True)
        allowed = chosen & allowed
    bias = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill_(~allowed, float("-inf"))
    return bias.unsqueeze(-3) if bias.dim() == 3 else bias[None, None]


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Softmax attention; values are padded to the width of the keys, which the fast kernels ask for."""
    width = values.shape[-1]
    padded = F.pad(values, (0, keys.shape[-1] - width))
    out = F.scaled_dot_product_attention(q, keys, padded, attn_mask=bias, is_causal=bias is None, scale=scale)
    return out[..., :width]


def finish_distillation(p: Pass) -> None:
    """Closes a group of layers: the divergence of the indexer's scores from the group's attention."""
    if p.student is None or p.teacher is None:
        p.student = p.teacher = None
        return
    target = p.teacher / p.teacher.sum(-1, keepdim=True)
    log_student = p.student.log_softmax(-1).clamp(min=-60.0)
    p.distill_losses.append((target * ((target + 1e-9).log() - log_student)).sum(-1).mean())
    assert p.query_rows is not None
    p.notice_losses += [notice_loss(scores, target, p.query_rows) for scores in p.mutated]
    p.student = p.teacher = None


class Layer(nn.Module):
    """Attention, then a dense or a sparse feed-forward part."""

    def __init__(self, c: Settings, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(c, layer)
        self.mlp: nn.Module = (
            MoE(c) if layer >= c.first_k_dense_replace else MLP(c.hidden_size, c.intermediate_size)
        )
        self.input_layernorm = PlainNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = PlainNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, p: Pass, dtype: torch.dtype) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x).to(dtype), p)
        return x + self.mlp(self.post_attention_layernorm(x).to(dtype))


class Trunk(nn.Module):
    """Embedding, layers, last norm: the `model.` of the checkpoint's names."""

    def __init__(self, c: Settings) -> None:
        super().__init__()
        self.embed_tokens = QuantLinear(c.hidden_size, c.vocab_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = PlainNorm(c.hidden_size, c.rms_norm_eps)


class Pocket(nn.Module):
    """The whole model. `dtype` is what the matrix products run in."""

    def __init__(self, c: Settings, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.c, self.dtype = c, dtype
        self.model = Trunk(c)
        self.lm_head = QuantLinear(c.hidden_size, c.vocab_size)

    def hidden(
        self, ids: Tensor, sparse: bool, query_rows: Tensor | None = None, **decoding: Any
    ) -> tuple[Tensor, Pass]:
        """The last hidden states, and the pass with the indexer's losses."""
        positions = decoding.get("positions")
        rows = (
            torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions[:, None]
        )
        cos, sin = rotary_table(rows, self.c.qk_rope_head_dim, self.c.rope_theta)
        p = Pass(cos, sin, sparse, query_rows=query_rows, **decoding)
        x = Lookup.apply(self.model.embed_tokens.effective(), ids).float()
        for layer in self.model.layers:
            x = layer(x, p, self.dtype)
        finish_distillation(p)
        return self.model.norm(x).to(self.dtype), p

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()

    def set_quantised(self, on: bool) -> None:
        """Turns the quantised form of every weight on or off."""
        for module in self.modules():
            if hasattr(module, "quantised"):
                module.quantised = on
