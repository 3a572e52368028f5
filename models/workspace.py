"""What a step takes in memory beside what stays: for the plan. Called by loading.

Each figure is a bound on what lies in memory at one time, whatever the routing is: a prompt of one token
repeated sends all its rows to the same experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from models.args import ModelArgs
from models.arithmetic import Arithmetic
from models.attention.attention import PART_ROWS
from models.attention.tiles import gathered_rows, tile_rows
from models.loading.building import is_held_as_stored
from streaming.eviction.policy import OBSERVED_ROWS
from streaming.files.headers import TensorEntry
from streaming.files.index import PROJECTIONS, ExpertIndex

Size = tuple[int, int]  # bytes of unpacked weights, and what lies beside them while they are unpacked

# What MLX 0.32 takes on the CPU to unpack a weight, in sizes of the unpacked weight, by bits.
UNPACKED_COPIES = {2: 2, 3: 4, 4: 2, 5: 6, 6: 7, 8: 2}
FLOAT4_COPIES = 4  # mxfp4, nvfp4
# Of each score while the best are found by bits: itself, its order, an answer for each bit, its rank.
COUNTED_BYTES = 64
SCORED_ROWS = 64  # whose logits are held at once while a prompt is scored: 40 MB for 154,880 tokens
LOGITS_COPIES = 4  # logits, their exponents, sorted and filtered


def workspace_bytes(
    args: ModelArgs,
    arithmetic: Arithmetic,
    trunk: Mapping[str, TensorEntry],
    index: ExpertIndex,
    max_context: int,
) -> int:
    """The largest transients of a step, however long the prompt.

    Beside a part's rows there is the largest of what attention, experts, a dense layer and the vocabulary
    take, each with the weights that lie unpacked meanwhile, and a layer's old rows while its cache grows.
    """
    rows = min(PART_ROWS, max_context)
    row_bytes = rows * arithmetic.dtype.size
    scored = min(SCORED_ROWS, max_context) * args.vocab_size * 4 * LOGITS_COPIES
    unpacked = _Unpacked(args, arithmetic, trunk, index)
    return row_bytes * 4 * args.hidden_size + max(
        _attention_bytes(args, arithmetic, rows, max_context) + sum(unpacked.attention()),
        _routing_bytes(args, arithmetic, rows),
        _experts_bytes(args, row_bytes, arithmetic.experts_at_once, unpacked),
        _mlp_bytes(max(args.intermediate_size, _shared_size(args)), row_bytes, unpacked),
        scored + sum(unpacked.head()),
        max_context * args.latent_dim * arithmetic.dtype.size,
    )


def loading_bytes(trunk: Mapping[str, TensorEntry], arithmetic: Arithmetic, exact: tuple[str, ...]) -> int:
    """What lies beside the trunk while it is loaded: a tensor as it is stored, until it is cast or split.

    `exact`: last words of the names that are held in float32.
    """
    most = 0
    for name, entry in trunk.items():
        is_cast = not is_held_as_stored(name, entry, arithmetic, exact)
        most = max(most, entry.nbytes * (is_cast + (".kv_b_proj." in name)))
    return most


def _attention_bytes(args: ModelArgs, arithmetic: Arithmetic, rows: int, max_context: int) -> int:
    widths = 2 * args.latent_dim + args.kv_lora_rank + args.qk_head_dim + args.v_head_dim
    tiles = _tiles_bytes(args, arithmetic, rows, max_context)
    return rows * arithmetic.dtype.size * args.num_attention_heads * widths + tiles


def _routing_bytes(args: ModelArgs, arithmetic: Arithmetic, rows: int) -> int:
    """Parts on their way through the router: normed, in float32, and four arrays of all experts' scores.

    Beside them lie the scores of the rows that are observed, by parts and put together.
    """
    scores = 4 * args.n_routed_experts
    per_row = args.hidden_size * (arithmetic.dtype.size + 4) + 4 * scores
    return arithmetic.pieces_in_flight * rows * per_row + 2 * OBSERVED_ROWS * scores


def _experts_bytes(args: ModelArgs, row_bytes: int, at_once: int, unpacked: "_Unpacked") -> int:
    """While a few experts' weights are unpacked, or all rows are multiplied with them."""
    weights, copies = unpacked.expert()
    first = row_bytes * (args.moe_intermediate_size + args.hidden_size)
    others = row_bytes * (2 * args.moe_intermediate_size + args.hidden_size)
    return at_once * (weights + first + max(copies, others))


def _mlp_bytes(width: int, row_bytes: int, unpacked: "_Unpacked") -> int:
    """While the weights are unpacked beside gate and up, or before and after the activation."""
    weights, copies = unpacked.mlp()
    return weights + row_bytes * 2 * width + max(copies, row_bytes * 2 * width)


def sweep_row_bytes(args: ModelArgs, arithmetic: Arithmetic, max_context: int) -> int:
    """What each row of a sweep takes beside its cache, from layer to layer.

    The hidden state, before and after the experts where there are several parts; their float32 sum; ids and
    weights of the routing, twice, and for each of its pairs the places in NumPy; and the selection that
    shared layers reuse: a mask over the keys seen or, beyond `gather_from` times as many as are selected,
    positions; none while all keys are attended to.
    """
    copies = 1 if max_context <= PART_ROWS else 2
    hidden = args.hidden_size * (copies * arithmetic.dtype.size + 4)
    routing = (16 + 48) * args.num_experts_per_tok
    if max_context <= args.index_topk:
        return hidden + routing
    mask = min(max_context, arithmetic.gather_from * args.index_topk)
    return hidden + routing + max(4 * args.index_topk, mask)


def _shared_size(args: ModelArgs) -> int:
    return args.moe_intermediate_size * args.n_shared_experts


def _tiles_bytes(args: ModelArgs, arithmetic: Arithmetic, num_rows: int, max_context: int) -> int:
    """What tiles in flight take: three copies of attention's scores, or the indexer's scores and the choice.

    Where several are in flight, a few are the indexer's pieces and one or two choose, in smaller tiles.
    """
    limit, itemsize = arithmetic.tile_elements, arithmetic.dtype.size
    depth, heads, k = arithmetic.pieces_in_flight, args.num_attention_heads, args.index_topk
    scores = heads * min(max_context, arithmetic.gather_from * k)
    attention = depth * 3 * itemsize * scores * min(num_rows, tile_rows(scores, limit))
    if max_context <= k:
        return attention
    height = min(num_rows, gathered_rows(k * args.latent_dim, limit))
    gathered = depth * itemsize * height * k * (args.latent_dim + 3 * heads)
    selection = 3 * 4 * (limit + max_context * min(num_rows, tile_rows(max_context, limit)))
    if arithmetic.selects_by_bits:
        height = min(num_rows, tile_rows(max(scores, max_context), limit))
        selection = max(selection, 2 * 4 * limit + COUNTED_BYTES * max_context * height)
    return max(attention, gathered, selection)


def _gated_size(sizes: Sequence[Size], one_by_one: bool) -> Size:
    """Of gate, up and down: the weights that lie unpacked, and the most beside them while they are unpacked.

    Where MLX multiplies, gate and up are unpacked together, then down. For NumPy each is gone when another
    comes.
    """
    if one_by_one:
        return max(sizes, key=sum)
    (gate, gate_copies), (up, up_copies), (down, down_copies) = sizes
    return gate + up + down, max(gate_copies + up_copies, down_copies)


class _Unpacked:
    """Bytes of unpacked weights, and what unpacking takes beside them; nothing where packed ones are
    multiplied as they are."""

    def __init__(
        self,
        args: ModelArgs,
        arithmetic: Arithmetic,
        trunk: Mapping[str, TensorEntry],
        index: ExpertIndex,
    ) -> None:
        self._args, self._trunk, self._index = args, trunk, index
        self._unpacks, self._itemsize = arithmetic.max_packed_rows is not None, arithmetic.dtype.size
        self._outputs_at_once = arithmetic.outputs_at_once
        self._one_by_one = arithmetic.uses_numpy

    def attention(self) -> Size:
        """The largest of its weights."""
        args, heads = self._args, self._args.num_attention_heads
        widths = {
            "q_a_proj": args.hidden_size, "q_b_proj": args.q_lora_rank, "o_proj": heads * args.v_head_dim,
            "kv_a_proj_with_mqa": args.hidden_size, "embed_q": args.qk_nope_head_dim,
            "unembed_out": args.kv_lora_rank, "wq_b": args.q_lora_rank, "wk": args.hidden_size,
        }  # fmt: skip
        return max((*self._each("self_attn", widths), *self._each("indexer", widths)), default=(0, 0))

    def mlp(self) -> Size:
        """The three weights of a dense layer, or of shared experts."""
        dense = self._each("mlp", self._widths(self._args.intermediate_size))
        shared = self._each("shared_experts", self._widths(_shared_size(self._args)))
        most = max((*dense, *shared), default=(0, 0))
        return _gated_size([most] * 3, self._one_by_one)

    def head(self) -> Size:
        return max(self._each("", {"lm_head": self._args.hidden_size}), default=(0, 0))

    def expert(self) -> Size:
        """One expert's weights, of the layer where that is most."""
        widths = self._widths(self._args.moe_intermediate_size)
        most = (0, 0)
        for layer in self._index.layers:
            parts = {part.name: part for part in self._index.parts(layer)}
            sizes = [
                self._size(parts[f"{name}.weight"].shape, parts[f"{name}.scales"].dtype, widths[name])
                if f"{name}.scales" in parts
                else (0, 0)
                for name in PROJECTIONS
            ]
            most = max(most, _gated_size(sizes, self._one_by_one))
        return most

    def _widths(self, intermediate: int) -> dict[str, int]:
        hidden = self._args.hidden_size
        return {"gate_proj": hidden, "up_proj": hidden, "down_proj": intermediate}

    def _each(self, parent: str, widths: Mapping[str, int]) -> Iterator[Size]:
        """Of the trunk's packed weights in modules of this parent, by the widths that they multiply."""
        for name, entry in self._trunk.items():
            path, _, kind = name.rpartition(".")
            rooms, _, module = path.rpartition(".")
            scales = self._trunk.get(f"{path}.scales")
            is_meant = kind == "weight" and rooms.rpartition(".")[2] == parent and module in widths
            if is_meant and scales is not None:
                yield self._size(entry.shape, scales.dtype, widths[module])

    def _size(self, words: tuple[int, ...], scales_dtype: str, width: int) -> Size:
        if not self._unpacks:
            return 0, 0
        bits = words[-1] * 32 // width
        copies = FLOAT4_COPIES if scales_dtype == "U8" and bits == 4 else UNPACKED_COPIES.get(bits, 7)
        outputs = self._outputs_at_once(words[0], width) if len(words) == 2 else prod(words[:-1])
        unpacked = outputs * width * self._itemsize
        return unpacked, (copies - 1) * unpacked
