// delta_linear and delta_linear_grouped for many rows of x: a GEMM on tiles of W that are patched in shared
// memory, so that what is multiplied are the fine-tuned words themselves. After linear_segments.cu.
//
//   for each of the block's pairs (panel of 64 rows of W, row tile: up to 128 rows of x of one tenant, f32: 64):
//     the tenant's delta, opened before; refused: NaN
//     for each tile column of the delta (the base, `raw`: one of all columns):
//       where the panel's rows begin in the delta's streams (patch_*.cuh)
//       for each window of 64 columns (f32: 32; stages.cuh): W by cp.async, 2 windows ahead, x by steps of 32 columns, 1 ahead
//         W of the next window: base words -> fine-tuned words   (`raw`: the payload is W)
//         x . W of this window: ldmatrix and mma.m16n8k16, f32 sums; f32: FMAs         (sums.cuh)
//     sum + bias: finite -> round once -> y;  else again from the fine-tuned words in f64 (again_f64_tile.cuh)
//
// One barrier a step. Pairs go to blocks with the row tiles of a panel side by side, so that a panel's words and
// deltas are read from DRAM once and from L2 for the others.
//
// The order of one output is that of sums.cuh over all columns, + bias, one rounding to the dtype: it depends on
// the row and its tenant's words alone.
//
// Bytes: a panel's base words and its tenant's tiles once a pair (a pair has up to 128 rows of x: they are read, and
// the deltas decoded, ceil(rows of the tenant / 128) times; `exponent` reads base words twice a pair), x once a panel,
// from L2. Threads 256, two blocks a multiprocessor: 128 registers. Shared memory: 40 KiB of stages, which hold the marks
// of rows before the steps and the decode path after them; 2 KiB.
//
// Issue and shared memory: PREDICTED.md counts both. On sm_90 it is shared memory that a block waits for: for each mma 256 bytes of
// operands (a warp has 32 x 32 outputs) and 96 of copies (a block 64 x 128) take 2.75 cycles of it, and the mma one. Warps of 64 x 64
// and blocks of 256 x 128 would take 1.4; they need 128 registers for sums alone, so one block a multiprocessor, and a quarter of
// the pairs, of which 4096 rows of W and 256 of x then give 32 for 132 multiprocessors.
//
// Tried, and taken out by arithmetic, not measured: panels of 32 rows of W where those of 64 leave half of the multiprocessors without
// one. Each panel reads its rows of x from L2 again: of 4096 x 4096, bf16, L2 gave 101 MB in place of 67 for 64 rows of x and 168 in place
// of 101 for 128, so 20 us in place of 13 and 34 in place of 20 at 5 TB/s, while issuing (64 rows, sparse 1 %) fell from 11.2 us to 9.4 and
// the bytes of W in flight over the machine stayed the same.
#include "again_f64_tile.cuh"
#include "patch_entries.cuh"
#include "patch_rows.cuh"
#include "patch_streams.cuh"
#include "sums.cuh"

namespace xorz {
namespace {

// What the block is at: panel `at` and tile `tile` of the rows of x: rows r0 .. of W, `panel` of them, and
// `count` rows of x. In shared memory, where it costs no registers.
struct Pair {
  uint64_t r0;
  uint32_t at, tile;
  uint32_t panel, count;
};

template <class W>
struct LargeShared {
  union {
    Stages<W> stages;
    Marks marks;
    AgainF64Tile<W> f64;
  };
  TenantRows tenant;
  AgainBits<W> again;
  Pair pair;
  uint32_t rows[kRowsOfX<W>];
  // Bit i: sixteen rows of the panel, from 16 i on, in which a tile contradicts itself.
  uint32_t corrupt;
};

// sums += x . (words, patched), over `across` tile columns of `cols` columns. The block calls.
template <class Patch, class Sums, class W>
XORZ_DEVICE void add_patched(LargeShared<W>& shared, const Product<W>& p, const W* words, uint32_t across,
                             uint32_t cols, Sums& sums) {
  const Pair& pair = shared.pair;
  const uint32_t k = static_cast<uint32_t>(p.k);
  Copier<W, Patch::kRoom && sizeof(W) == 2> copier;
  copier.begin(p.x, shared.rows, pair.count, words + pair.r0 * p.k, pair.panel, p.k);
  XORZ_NO_UNROLL
  for (uint32_t i = 0; i < across; i++) {  // hot: across
    const uint32_t from = i * cols, to = k - from < cols ? k : from + cols;
    Patch patch;
    patch.begin(shared.marks, &shared.corrupt, shared.tenant.view, words, pair.r0, pair.panel, i, 0);
    const auto patch_step = [&](W* w, uint32_t column, uint32_t step) {
      patch.template step_of_window<Stages<W>::kSteps>(w, column - from, step);
    };
    run_steps(shared.stages, copier, from, to, patch_step, sums);
    patch.end(&shared.corrupt);
  }
}

// What the sums are, to y; which of them are to be computed again. The block calls.
template <class D, class Sums>
XORZ_DEVICE bool write_sums(LargeShared<typename D::Word>& shared, const Product<typename D::Word>& p,
                            Sums& sums) {
  using W = typename D::Word;
  const Pair& pair = shared.pair;
  const bool refused = shared.tenant.way == kRefused;
  // By sixteens of the panel.
  const uint32_t lost = refused ? ~0u : shared.corrupt;
  if (p.biases != nullptr && !refused) {
    const W* bias = p.biases + bias_row(p, shared.tenant.slot) + pair.r0;
    sums.add([&](uint32_t r) { return r < pair.panel ? D::value(load_once(bias + r)) : 0; });
  }
  bool again = false;
  sums.each_row([&](uint32_t j, const auto& each_of_row) {
    if (j >= pair.count) return;
    W* row = p.out + shared.rows[j] * p.n + pair.r0;
    each_of_row([&](uint32_t r, float sum) {
      if (r >= pair.panel) return;
      if (lost != 0 && (lost >> (r / kTileLanes) & 1) != 0) {  // cold: lost
        store(row + r, nan_word<W>());                         // cold: lost
      } else if (finite(sum)) {
        store(row + r, D::round(sum));
      } else {
        shared_or(&shared.again.bits[r][j / 32], 1u << (j % 32));  // cold: again
        again = true;                                              // cold: again
      }
    });
  });
  return again;
}

// How tiles of `sparse` are patched.
template <class D>
struct EntriesOf {
  using Type = PatchRows<D>;
};
template <>
struct EntriesOf<F32> {
  using Type = PatchEntries<F32>;
};

template <class D>
XORZ_DEVICE void linear_pair(LargeShared<typename D::Word>& shared, const Product<typename D::Word>& p) {
  using W = typename D::Word;
  using Sums = typename SumsOf<D>::Type;
  const View& view = shared.tenant.view;
  const uint32_t way = shared.tenant.way, k = static_cast<uint32_t>(p.k);
  Sums sums;
  sums.begin(shared.pair.count);
  if (way == kOnEntries)
    add_patched<typename EntriesOf<D>::Type>(shared, p, p.weight, view.across, view.tile_cols(), sums);
  else if (way == kOnStream)
    add_patched<PatchStreams<D>>(shared, p, p.weight, view.across, view.tile_cols(), sums);
  else if (way != kRefused)
    add_patched<NoPatch>(
        shared, p, way == kOnOwnWords ? reinterpret_cast<const W*>(view.bytes + view.payload) : p.weight,
        k != 0, k, sums);
  block_sync();
  const uint64_t r0 = shared.pair.r0;
  if (block_any(write_sums<D>(shared, p, sums)))
    compute_tile_again<D>(shared.f64, shared.again, shared.tenant, p, shared.rows, r0);  // cold: again
  if (thread_index_anew() == 0 && shared.corrupt != 0)
    report(p.status, kTileCorrupt, p.slots == nullptr ? 0 : static_cast<uint32_t>(shared.tenant.slot));
}

// The pair's tenant and rows to shared memory. The block calls.
template <class W>
XORZ_DEVICE void fetch_pair(LargeShared<W>& shared, const Product<W>& p, const Workspace& work) {
  const uint32_t thread = thread_index_anew();
  Pair& pair = shared.pair;
  const Vector record = load_vector_once(work.tiles + pair.tile);
  const uint32_t first = record.part[1], count = record.part[2];
  if (thread < sizeof(TenantRows) / 16)
    store_shared(reinterpret_cast<Vector*>(&shared.tenant) + thread,
                 load_vector_once(reinterpret_cast<const Vector*>(work.tenants + record.part[0]) + thread));
  for (uint32_t i = thread; i < count; i += kLargeThreads) shared.rows[i] = load_once(work.order + first + i);
  uint32_t* bits = &shared.again.bits[0][0];
  for (uint32_t i = thread; i < sizeof(shared.again) / 4; i += kLargeThreads) bits[i] = 0;
  block_sync();
  if (thread == 0) {
    shared.corrupt = 0;
    shared.tenant.view.bytes = p.arena + shared.tenant.offset;
    pair.r0 = static_cast<uint64_t>(pair.at) * kRowsOfW;
    pair.panel = p.n - pair.r0 < kRowsOfW ? static_cast<uint32_t>(p.n - pair.r0) : kRowsOfW;
    pair.count = count;
  }
  block_sync();
}

template <class D>
XORZ_DEVICE void linear_large(LargeShared<typename D::Word>& shared, const Product<typename D::Word>& p,
                              uint8_t* workspace) {
  const Workspace work = workspace_of(p, workspace);
  const uint32_t tiles = load_once(work.tile_count);
  if (tiles == 0) return;
  Pair& pair = shared.pair;
  if (thread_index_anew() == 0) {
    pair.at = block_x() / tiles;
    pair.tile = block_x() % tiles;
  }
  block_sync();
  XORZ_NO_UNROLL
  while (static_cast<uint64_t>(pair.at) * kRowsOfW < p.n) {
    fetch_pair(shared, p, workspace_of(p, workspace));
    linear_pair<D>(shared, p);
    if (thread_index_anew() == 0) {
      const uint32_t all = load_once(work.tile_count);
      const uint32_t tile = pair.tile + blocks_x() % all;
      pair.at += blocks_x() / all + (tile >= all);
      pair.tile = tile >= all ? tile - all : tile;
    }
    block_sync();
  }
}

}  // namespace
}  // namespace xorz

// See README.md for the parameters.
#define XORZ_LINEAR_LARGE(name, D)                                                                           \
  XORZ_KERNEL(256, 2)                                                                                        \
  xorz_linear_large_##name(const xorz::D::Word* x, const xorz::D::Word* weight, const xorz::D::Word* biases, \
                           uint64_t bias_stride, const uint8_t* arena, uint64_t arena_bytes,                 \
                           const int64_t* slots, uint64_t slot_count, const int32_t* tenant_of_row,          \
                           xorz::D::Word* out, uint64_t m, uint64_t n, uint64_t k, uint32_t* status,         \
                           uint8_t* workspace) {                                                             \
    XORZ_SHARED xorz::LargeShared<xorz::D::Word> shared;                                                     \
    xorz::linear_large<xorz::D>(shared,                                                                      \
                                {x, weight, biases, bias_stride, arena, arena_bytes, slots, slot_count,      \
                                 tenant_of_row, out, m, n, k, status},                                       \
                                workspace);                                                                  \
  }

XORZ_LINEAR_LARGE(bf16, Bf16)
XORZ_LINEAR_LARGE(f16, F16)
XORZ_LINEAR_LARGE(f32, F32)
