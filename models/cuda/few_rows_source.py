"""CUDA source of attention for few rows. Called by `models.cuda.few_rows`."""

from models.cuda.product_source import TENSOR_CORES

ROTATION = r"""
// Cosine and sine of the angle of pair i at a position, as MLX's rope has them.
__device__ __forceinline__ float2 turn_of(const float* periods, int i, int position) {
  const float angle = static_cast<float>(position) * static_cast<float>(1.0 / periods[i]);
  return make_float2(cosf(angle), sinf(angle));
}
__device__ __forceinline__ float2 rotate(float2 v, float2 turn) {
  return make_float2(v.x * turn.x - v.y * turn.y, v.x * turn.y + v.y * turn.x);
}
"""
REDUCTION = r"""
// Sum over a block of at most 1,024 threads, in one order, for all of them.
__device__ __forceinline__ float block_sum(float v, float* shared) {
  for (int d = 16; d; d /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, d);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
  for (int w = 0; w < blockDim.x / 32; ++w) v += shared[w];
  __syncthreads();
  return v;
}
"""
# Block x norms the query residual (0), makes the cache's row (1) or the index key (2) of row y.
NORMED = r"""
  __shared__ float shared[32];
  const long row = blockIdx.y;
  const int me = threadIdx.x, step = blockDim.x;
  if (blockIdx.x == 0) {
    const int width = q_shape[1];
    float sum = 0;
    for (int i = me; i < width; i += step) {
      const float v = static_cast<float>(q[row * width + i]);
      sum += v * v;
    }
    const float factor = rsqrtf(block_sum(sum, shared) / width + 1e-6f);
    for (int i = me; i < width; i += step)
      residual[row * width + i] =
          static_cast<T>(static_cast<float>(q[row * width + i]) * factor * static_cast<float>(q_norm[i]));
  } else if (blockIdx.x == 1) {
    const int width = kv_shape[1], latent = kv_norm_shape[0];
    float sum = 0;
    for (int i = me; i < latent; i += step) {
      const float v = static_cast<float>(kv[row * width + i]);
      sum += v * v;
    }
    const float factor = rsqrtf(block_sum(sum, shared) / latent + 1e-6f);
    for (int i = me; i < latent; i += step)
      rows[row * width + i] =
          static_cast<T>(static_cast<float>(kv[row * width + i]) * factor * static_cast<float>(kv_norm[i]));
    for (int i = me; i < (width - latent) / 2; i += step) {
      const long at = row * width + latent + 2 * i;
      const float2 v = make_float2(static_cast<float>(kv[at]), static_cast<float>(kv[at + 1]));
      const float2 r = rotate(v, turn_of(periods, i, positions[row]));
      rows[at] = static_cast<T>(r.x);
      rows[at + 1] = static_cast<T>(r.y);
    }
  }
"""
NORMED_KEYS = r"""
  else {
    const int width = k_shape[1], pair = me;
    float2 v = make_float2(0, 0);
    if (2 * pair < width) v = make_float2(k[row * width + 2 * pair], k[row * width + 2 * pair + 1]);
    const float mean = block_sum(v.x + v.y, shared) / width;
    float2 off = make_float2(v.x - mean, v.y - mean);
    const float squares = 2 * pair < width ? off.x * off.x + off.y * off.y : 0.0f;
    const float factor = rsqrtf(block_sum(squares, shared) / width + 1e-6f);
    if (2 * pair < width) {
      const long a = 2 * pair, b = a + 1;
      float2 r = make_float2(off.x * factor * static_cast<float>(k_norm[a]) + static_cast<float>(k_bias[a]),
                             off.y * factor * static_cast<float>(k_norm[b]) + static_cast<float>(k_bias[b]));
      if (2 * pair < ROTATED) r = rotate(r, turn_of(periods, pair, positions[row]));
      keys[row * width + 2 * pair] = static_cast<T>(r.x);
      keys[row * width + 2 * pair + 1] = static_cast<T>(r.y);
    }
  }
"""
# 32 keys a block of 128 threads: a thread has one key and every fourth part of the heads.
SCORES = r"""
  constexpr int KEYS = 32, PART = HEADS / 4;
  __shared__ __align__(16) float qs[HEADS * D];
  __shared__ __align__(16) float ks[KEYS * (D + 4)];
  __shared__ float2 turns[ROTATED / 2];
  __shared__ float sums[4][KEYS];
  const int me = threadIdx.x, key = me % KEYS, part = me / KEYS, num_keys = keys_shape[0];
  const long row = blockIdx.y;
  const int last = positions[row], first = blockIdx.x * KEYS;
  if (first > last) return;
  for (int i = me; i < ROTATED / 2; i += 128) turns[i] = turn_of(periods, i, last);
  for (int i = me; i < KEYS * D / 8; i += 128) {
    const int r = i / (D / 8), c = i % (D / 8) * 8;
    const uint4 v = *reinterpret_cast<const uint4*>(keys + min(first + r, num_keys - 1) * 1L * D + c);
    float* to = ks + r * (D + 4) + c;
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
    for (int j = 0; j < 4; ++j) {
      to[2 * j] = __uint_as_float(words[j] << 16);
      to[2 * j + 1] = __uint_as_float(words[j] & 0xFFFF0000u);
    }
  }
  __syncthreads();
  for (int i = me; i < HEADS * D / 2; i += 128) {
    float2 v = *reinterpret_cast<const float2*>(queries + row * HEADS * D + 2 * i);
    if (i % (D / 2) < ROTATED / 2) v = rotate(v, turns[i % (D / 2)]);
    *reinterpret_cast<float2*>(qs + 2 * i) = v;
  }
  __syncthreads();
  float dots[PART] = {};
  for (int d = 0; d < D; d += 4) {
    const float4 k = *reinterpret_cast<const float4*>(ks + key * (D + 4) + d);
#pragma unroll
    for (int h = 0; h < PART; ++h) {
      const float4 q = *reinterpret_cast<const float4*>(qs + (part * PART + h) * D + d);
      dots[h] += q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
    }
  }
  float sum = 0;
  for (int h = 0; h < PART; ++h) sum += weights[row * HEADS + part * PART + h] * fmaxf(dots[h], 0.0f);
  sums[part][key] = sum;
  __syncthreads();
  if (me < KEYS && first + me < num_keys)
    out[row * num_keys + first + me] = (sums[0][me] + sums[1][me] + sums[2][me] + sums[3][me]) * SCALE;
"""
NONE = r"""
#define NONE __uint_as_float(0xFF800000u)  // minus infinity
"""
FRAGMENTS = (
    TENSOR_CORES
    + r"""
// Four 8 x 8 matrices out of shared memory, transposed; each lane names one row of them.
__device__ __forceinline__ void load_transposed(unsigned (&to)[4], const Bf16* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from))));
}

__device__ __forceinline__ void copy_16_bytes(Bf16* to, const Bf16* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
"""
)
# 64 keys and 16 heads of one row a block of eight warps. Block x writes what its keys come to; `parts` has
# the largest score of each head and the sum of its exponentials.
ATTENDED = r"""
  constexpr int KEYS = 64, STRIDE = LATENT + 8, TILES = VALUES / 64;
  extern __shared__ __align__(16) unsigned char memory[];
  Bf16* tile = reinterpret_cast<Bf16*>(memory);
  __shared__ float scores[16][KEYS + 4];
  __shared__ __align__(16) Bf16 chances[16][KEYS + 8];
  __shared__ int places[KEYS];
  const int me = threadIdx.x, lane = me % 32, warp = me / 32, g = lane / 4, t = lane % 4;
  const int heads = q_shape[1], head = blockIdx.y * 16, first = blockIdx.x * KEYS;
  const int last = positions[blockIdx.z];
  const long row = blockIdx.z, at = (row * gridDim.x + blockIdx.x) * heads;
  if (me < KEYS) {
    PLACE
    places[me] = place <= last ? place : -1;
  }
  const bool is_empty = !__syncthreads_or(me < KEYS && places[me < KEYS ? me : 0] >= 0);
  if (is_empty) {
    if (me < 16 && head + me < heads) {
      parts[2 * (at + head + me)] = NONE;
      parts[2 * (at + head + me) + 1] = 0;
    }
    return;
  }
  const Bf16* rows = reinterpret_cast<const Bf16*>(keys);
  for (int i = me; i < KEYS * (LATENT / 8); i += 256) {
    const int r = i / (LATENT / 8), c = i % (LATENT / 8) * 8;
    copy_16_bytes(tile + r * STRIDE + c, rows + max(places[r], 0) * 1L * LATENT + c);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float sum[4] = {0, 0, 0, 0};
  const Bf16* low = reinterpret_cast<const Bf16*>(q) + (row * heads + min(head + g, heads - 1)) * LATENT;
  const Bf16* high = reinterpret_cast<const Bf16*>(q) + (row * heads + min(head + g + 8, heads - 1)) * LATENT;
  const Bf16* mine = tile + (warp * 8 + g) * STRIDE;
#pragma unroll 6
  for (int d = t * 8; d < LATENT; d += 32) {
    const uint4 a = *reinterpret_cast<const uint4*>(low + d), b = *reinterpret_cast<const uint4*>(high + d);
    const uint4 k = *reinterpret_cast<const uint4*>(mine + d);
    const unsigned front[4] = {a.x, b.x, a.y, b.y}, back[4] = {a.z, b.z, a.w, b.w};
    mma(sum, front, k.x, k.y);
    mma(sum, back, k.z, k.w);
  }
  for (int i = 0; i < 4; ++i) scores[g + 8 * (i / 2)][warp * 8 + 2 * t + i % 2] = sum[i] * SCALE;
  __syncthreads();
  for (int h = warp; h < 16; h += 8) {
    const float a = places[lane] >= 0 ? scores[h][lane] : NONE;
    const float b = places[lane + 32] >= 0 ? scores[h][lane + 32] : NONE;
    float most = fmaxf(a, b);
    for (int d = 16; d; d /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, d));
    const Bf16 x = __float2bfloat16(__expf(a - most)), y = __float2bfloat16(__expf(b - most));
    float total = __bfloat162float(x) + __bfloat162float(y);
    for (int d = 16; d; d /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, d);
    chances[h][lane] = x;
    chances[h][lane + 32] = y;
    if (lane == 0 && head + h < heads) {
      parts[2 * (at + head + h)] = most;
      parts[2 * (at + head + h) + 1] = total;
    }
  }
  __syncthreads();
  float out[TILES][4] = {};
  for (int k = 0; k < KEYS; k += 16) {
    const unsigned a[4] = {*reinterpret_cast<const unsigned*>(&chances[g][k + 2 * t]),
                           *reinterpret_cast<const unsigned*>(&chances[g + 8][k + 2 * t]),
                           *reinterpret_cast<const unsigned*>(&chances[g][k + 2 * t + 8]),
                           *reinterpret_cast<const unsigned*>(&chances[g + 8][k + 2 * t + 8])};
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
      unsigned b[4];
      load_transposed(b, tile + (k + lane % 16) * STRIDE + warp * (VALUES / 8) + j * 8 + lane / 16 * 8);
      mma(out[j], a, b[0], b[1]);
      mma(out[j + 1], a, b[2], b[3]);
    }
  }
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (head + g + 8 * half < heads)
        *reinterpret_cast<float2*>(
            pieces + (at + head + g + 8 * half) * VALUES + warp * (VALUES / 8) + j * 8 + 2 * t) =
            make_float2(out[j][2 * half], out[j][2 * half + 1]);
"""
CHOSEN = "const int k = chosen_shape[1], place = first + me < k ? chosen[row * k + first + me] : last + 1;"
ALL = "const int place = first + me;"
# Adds up the pieces of one head and row.
JOINED = r"""
  const int splits = parts_shape[1], heads = parts_shape[2], width = pieces_shape[3], me = threadIdx.x;
  const long row = blockIdx.y, head = blockIdx.x;
  __shared__ float factors[1024];
  float most = NONE;
  for (int s = 0; s < splits; ++s) most = fmaxf(most, parts[2 * ((row * splits + s) * heads + head)]);
  float total = 0;
  for (int s = 0; s < splits; ++s) {
    const float* part = parts + 2 * ((row * splits + s) * heads + head);
    total += part[1] * __expf(part[0] - most);
  }
  for (int s = me; s < splits; s += blockDim.x)
    factors[s] = __expf(parts[2 * ((row * splits + s) * heads + head)] - most) / total;
  __syncthreads();
  for (int i = 2 * me; i < width; i += 2 * blockDim.x) {
    float2 sum = make_float2(0, 0);
    for (int s = 0; s < splits; ++s)
      if (factors[s] > 0) {
        const float2 v =
            *reinterpret_cast<const float2*>(pieces + ((row * splits + s) * heads + head) * width + i);
        sum.x += factors[s] * v.x;
        sum.y += factors[s] * v.y;
      }
    out[(row * heads + head) * width + i] = static_cast<T>(sum.x);
    out[(row * heads + head) * width + i + 1] = static_cast<T>(sum.y);
  }
"""
