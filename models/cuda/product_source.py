"""CUDA source of products of few rows with 4-bit weights. Called by `models.cuda.products`.

A block computes 16 outputs of up to eight rows: its warps share the groups of values among them, unpack to
bfloat16 and multiply on tensor cores; scales and biases are applied in float32, group by group.
"""

# Groups of packed values that a warp has on their way from memory at a time.
GROUPS_AT_ONCE = 4

# For every source that multiplies on tensor cores.
TENSOR_CORES = r"""
#include <cuda_bf16.h>
using Bf16 = __nv_bfloat16;

// Adds A[16, 16] B[16, 8] to d; the four words of A and two of B are this lane's.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
"""
HEADER = (
    TENSOR_CORES
    + r"""
// Values i and i + 4 of a word's eight: as bfloat16, affine ones with 128 added.
template <bool AFFINE>
__device__ __forceinline__ unsigned pair_of(unsigned word, int i) {
  const unsigned shifted = word >> (4 * i);
  if (AFFINE) return (shifted & 0x000F000Fu) | 0x43004300u;
  const unsigned small = ((shifted << 12) & 0x80008000u) | ((shifted << 6) & 0x01C001C0u);
  const __nv_bfloat162 unit = __bfloat162bfloat162(__ushort_as_bfloat16(0x7E80));
  const __nv_bfloat162 scaled = __hmul2(reinterpret_cast<const __nv_bfloat162&>(small), unit);
  return reinterpret_cast<const unsigned&>(scaled);
}

__device__ __forceinline__ float scale_of(Bf16 scale) { return __bfloat162float(scale); }
__device__ __forceinline__ float scale_of(unsigned char power) {
  return power ? __uint_as_float(static_cast<unsigned>(power) << 23) : __uint_as_float(0x00400000u);
}

// One warp's share of 16 outputs for 8 rows: groups `first` to `last` of rows lane / 4 and lane / 4 + 8.
template <bool AFFINE, int GROUP, typename S>
__device__ __forceinline__ void dot(
    float (&sum)[4], const Bf16* x, bool has_row, const unsigned* w, const S* scales, const S* biases,
    int first, int last, int groups) {
  constexpr int WORDS = GROUP / 32, AT_ONCE = GROUPS_AT_ONCE;
  const int t = threadIdx.x & 3;
  const long next_w = 8L * groups * (GROUP / 8), next_s = 8L * groups;
  const unsigned ones[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
  for (int at = first; at < last; at += AT_ONCE) {
    unsigned words[AT_ONCE][2][WORDS];
    uint4 xs[AT_ONCE][WORDS];
    float s[AT_ONCE][2], b[AT_ONCE][2];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const bool is_in = at + u < last;
      const int group = is_in ? at + u : first;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned* from = w + half * next_w + group * (GROUP / 8) + t * WORDS;
        unsigned(&to)[WORDS] = words[u][half];
        if constexpr (WORDS == 4) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        if constexpr (WORDS == 2) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
        if constexpr (WORDS == 1) to[0] = *from;
        s[u][half] = is_in ? scale_of(scales[half * next_s + group]) : 0.0f;
        b[u][half] = AFFINE && is_in ? scale_of(biases[half * next_s + group]) - 128.0f * s[u][half] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        xs[u][i] = has_row ? *reinterpret_cast<const uint4*>(x + group * GROUP + (t * WORDS + i) * 8)
                           : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      float d[4] = {0, 0, 0, 0}, total[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const uint4 v = xs[u][i];
        const unsigned p0 = __byte_perm(v.x, v.z, 0x5410), p1 = __byte_perm(v.x, v.z, 0x7632);
        const unsigned p2 = __byte_perm(v.y, v.w, 0x5410), p3 = __byte_perm(v.y, v.w, 0x7632);
        const unsigned low = words[u][0][i], high = words[u][1][i];
        const unsigned a[4] = {pair_of<AFFINE>(low, 0), pair_of<AFFINE>(high, 0),
                               pair_of<AFFINE>(low, 1), pair_of<AFFINE>(high, 1)};
        const unsigned c[4] = {pair_of<AFFINE>(low, 2), pair_of<AFFINE>(high, 2),
                               pair_of<AFFINE>(low, 3), pair_of<AFFINE>(high, 3)};
        mma(d, a, p0, p1);
        mma(d, c, p2, p3);
        if (AFFINE) {
          mma(total, ones, p0, p1);
          mma(total, ones, p2, p3);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[i] += s[u][i / 2] * d[i] + (AFFINE ? b[u][i / 2] * total[i] : 0.0f);
    }
  }
}

// Adds up what the warps have, in their order: [8 rows][16 outputs] in `out`.
__device__ __forceinline__ void add_warps(float* shared, const float (&sum)[4], float* out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* mine = shared + warp * 128;
#pragma unroll
  for (int i = 0; i < 4; ++i) mine[(2 * (lane & 3) + (i & 1)) * 16 + lane / 4 + 8 * (i / 2)] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < 128; i += blockDim.x) {
    float all = 0;
    for (int one = 0; one < warps; ++one) all += shared[one * 128 + i];
    out[i] = all;
  }
  __syncthreads();
}
""".replace("GROUPS_AT_ONCE;", f"{GROUPS_AT_ONCE};")
)

# Which matrix, and which rows of x with it: up to eight with one matrix, the same for each of several, for
# each of several heads of a row, or one with the matrix in its slot.
PLACE = {
    "one": """
  const int all_rows = x_shape[0], start = blockIdx.y * 8, N = w_shape[0], K = w_shape[1] * 8;
  const long matrix = 0, from = 1L * start * K, from_step = K, to = 1L * start * N, to_step = N;
  const int rows = min(8, all_rows - start);
""",
    "each": """
  const int all_rows = x_shape[1], tiles = (all_rows + 7) / 8, start = blockIdx.y % tiles * 8;
  const int N = w_shape[1], K = w_shape[2] * 8;
  const long matrix = blockIdx.y / tiles, row = matrix * all_rows + start;
  const long from = row * K, from_step = K, to = row * N, to_step = N;
  const int rows = min(8, all_rows - start);
""",
    "heads": """
  const int all_rows = x_shape[0], tiles = (all_rows + 7) / 8, start = blockIdx.y % tiles * 8;
  const int N = w_shape[1], K = w_shape[2] * 8, heads = x_shape[1], width = N + ROTATED;
  const long matrix = blockIdx.y / tiles, row = 1L * start * heads + matrix;
  const long from = row * x_shape[2], from_step = 1L * heads * x_shape[2];
  const long to = row * width, to_step = 1L * heads * width;
  const int rows = min(8, all_rows - start);
""",
    "slots": """
  const int N = w_shape[1], K = w_shape[2] * 8;
  const long matrix = slots[blockIdx.y], from = blockIdx.y / pairs_per_row * 1L * K, from_step = 0;
  const long to = 1L * blockIdx.y * N, to_step = 0;
  constexpr int rows = 1;
""",
}
# The block behind a head's outputs rotates what follows its inputs.
ROTATE = """
  if (blockIdx.x * 16 >= N) {
    for (int i = threadIdx.x; i < rows * (ROTATED / 2); i += blockDim.x) {
      const int r = i / (ROTATED / 2), pair = i % (ROTATED / 2);
      const auto* at = x + from + r * from_step + K + 2 * pair;
      const float2 v = make_float2(static_cast<float>(at[0]), static_cast<float>(at[1]));
      const float2 turned = rotate(v, turn_of(periods, pair, positions[start + r]));
      out[to + r * to_step + N + 2 * pair] = static_cast<T>(turned.x);
      out[to + r * to_step + N + 2 * pair + 1] = static_cast<T>(turned.y);
    }
    return;
  }
"""
BEGIN = """
  const int groups = K / GROUP;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4;
  const long output = blockIdx.x * 16L + g;
  const int each = (groups + warps - 1) / warps, first = warp * each, last = min(groups, first + each);
  const Bf16* mine = reinterpret_cast<const Bf16*>(x) + from + (g < rows ? g : 0) * from_step;
  __shared__ float shared[8 * 128], result[2][128];
"""
DOT = """
  {
    float sum[4] = {0, 0, 0, 0};
    const long scale_at = (matrix * N + output) * groups;
    dot<AFFINE, GROUP>(sum, mine, g < rows, WEIGHT + scale_at * (GROUP / 8), SCALES + scale_at,
                       BIASES + scale_at, first, last, groups);
    add_warps(shared, sum, result[WHICH]);
  }
"""
STORE = """
  for (int i = threadIdx.x; i < rows * 16; i += blockDim.x)
    out[to + i / 16 * to_step + blockIdx.x * 16L + i % 16] = static_cast<T>(VALUE);
"""
GATED = (
    """rounded(silu(bounded(rounded(result[0][i]), -NO_LIMIT))) * bounded(rounded(result[1][i]), -LIMIT)"""
)
# Comparisons, because fminf() would make a number of what is none.
SILU = """
#define NO_LIMIT __uint_as_float(0x7F800000u)
__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }
__device__ __forceinline__ float rounded(float v) { return __bfloat162float(__float2bfloat16(v)); }
__device__ __forceinline__ float bounded(float v, float least) {
  return v > BOUND ? BOUND : v < least ? least : v;
}
"""
# Several matrices one behind the other, each with an output of its own.
SEVERAL = """
  const int all_rows = x_shape[0], start = blockIdx.y * 8, K = x_shape[1];
  const int rows = min(8, all_rows - start);
  const unsigned* weight;
  const SCALE *scale, *bias;
  int N, which, tile = blockIdx.x;
  FIND
  const int groups = K / GROUP;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4;
  const long scale_at = (tile * 16L + g) * groups;
  const int each = (groups + warps - 1) / warps, first = warp * each, last = min(groups, first + each);
  const Bf16* mine = reinterpret_cast<const Bf16*>(x) + (start + (g < rows ? g : 0)) * 1L * K;
  __shared__ float shared[8 * 128], result[128];
  float sum[4] = {0, 0, 0, 0};
  dot<AFFINE, GROUP>(sum, mine, g < rows, weight + scale_at * (GROUP / 8), scale + scale_at, bias + scale_at,
                     first, last, groups);
  add_warps(shared, sum, result);
  for (int i = threadIdx.x; i < rows * 16; i += blockDim.x) {
    const long at = (start + i / 16) * 1L * N + tile * 16L + i % 16;
    STORES
  }
"""
