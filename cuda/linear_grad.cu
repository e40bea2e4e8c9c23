// delta_linear_grad_input and delta_linear_grouped_grad_input: grad (m x n) @ (base (+) delta), a row of x's gradient for
// each row of grad, each of any tenant. After linear_segments.cu. No dense matrix: a strip of a panel at a time.
//
//   for each of the block's pairs (strip of 256 columns of W, f32: 128; up to 64 rows of grad of one tenant):
//     the tenant's delta, opened before; refused: NaN
//     for each panel of 64 rows of W:
//       where the panel's rows reach the strip in the delta's streams (patch_*.cuh)
//       the strip of the panel by cp.async; base words -> fine-tuned words, each warp its 8 rows, 32 columns a step
//         (`raw`: the payload is W)
//       for each half of the panel: grad by cp.async; grad . W, f32 sums (grad_sums.cuh)
//     sum: finite -> round once -> x's gradient;  else again in f64: the panels once more for each 4 such rows of grad
//
// What is multiplied are the fine-tuned words themselves, those that are stored apart among them. The order of one output is
// that of grad_sums.cuh over all rows of W, one rounding to the dtype: it depends on the row and its tenant's words alone.
// Where a tile of the strip's tile column contradicts itself, all outputs of the strip are NaN for the tenant's rows.
//
// A strip walks each tile that it cuts from its first record to its last: what lies left of it, to know where it begins, and
// what lies right of it, to know that all is sound. So the tile's entries are read k / 256 times at worst, the base once
// for each 64 rows of grad. Threads 256. Shared memory: 32 KiB of W, which hold the marks of rows before; 4 KiB of grad (f32: 8).
#include "again_f64.cuh"
#include "grad_sums.cuh"
#include "patch_entries.cuh"
#include "patch_streams.cuh"

namespace xorz {
namespace {

static_assert(kStripColumns<uint16_t> % (32 * kWalkAhead<uint16_t>) == 0 &&
                  kStripColumns<uint32_t> % (32 * kWalkAhead<uint32_t>) == 0,
              "a strip begins where a walk marks");

// What the block is at: part `at` (a strip, and which 64 of a tile's rows of grad) and tile `tile` of the rows of grad:
// columns c0 .. of W, `columns` of them, and `count` rows of grad.
struct GradPair {
  uint32_t at, tile;
  uint32_t c0, columns, count;
};

template <class W>
struct GradShared {
  union {
    W w[kStripSteps<W>][kRowsOfW * kStepColumns];
    Marks marks;
  };
  alignas(16) W grad[kRowsOfGrad * kStepColumns];
  TenantRows tenant;
  GradPair pair;
  uint32_t rows[kRowsOfGrad];
  // Rows of grad of which an output is not finite in f32: bit j % 32 of word j / 32.
  uint32_t again[kRowsOfGrad / 32];
  uint32_t corrupt;
};

// Columns `column` .. + 31 of 64 rows to a buffer of stages.cuh; zeros from column `end` on, and where a row is null.
template <class W, class RowOf>
XORZ_DEVICE void stage_columns(W* to, RowOf row_of, uint32_t column, uint32_t end) {
  using S = Stages<W>;
  XORZ_NO_UNROLL
  for (uint32_t i = thread_index_anew(); i < kRowsOfW * S::kPieces; i += kLargeThreads) {
    const uint32_t row = i / S::kPieces, piece = i % S::kPieces, from = column + piece * S::kPer;
    const W* words = row_of(row);
    W* at = to + S::piece_at(row, piece);
    if (words != nullptr && from + S::kPer <= end && aligned(words + from, 16)) {
      copy_async(at, words + from);
      continue;
    }
    XORZ_NO_UNROLL
    for (uint32_t c = 0; c < S::kPer; c++)
      at[c] = words != nullptr && from + c < end ? load_once(words + from + c) : W(0);
  }
}

// The strip of the panel at row `r0` of W, `panel` rows of it, fine-tuned, to `shared.w`; of rows that there are not,
// zeros. The block calls, and must meet before it reads them.
template <class Patch, class W>
XORZ_DEVICE void fetch_strip(GradShared<W>& shared, const Product<W>& p, const W* words, uint64_t r0,
                             uint32_t panel) {
  const View& view = shared.tenant.view;
  const uint32_t k = static_cast<uint32_t>(p.k), c0 = shared.pair.c0;
  // Of a tile column; without a delta the strip is all there is.
  const bool tiled = shared.tenant.way == kOnEntries || shared.tenant.way == kOnStream;
  const uint32_t across = tiled ? c0 >> view.cols_log2 : 0, start = tiled ? c0 & (view.tile_cols() - 1) : 0;
  Patch patch;
  block_sync();
  patch.begin(shared.marks, &shared.corrupt, view, words, r0, panel, across, start);
  block_sync();
  const auto row_of = [&](uint32_t row) { return row < panel ? words + (r0 + row) * p.k : nullptr; };
  XORZ_NO_UNROLL
  for (uint32_t s = 0; s * kStepColumns < shared.pair.columns; s++)
    stage_columns(shared.w[s], row_of, c0 + s * kStepColumns, k);
  copies_end_group();
  wait_for_copies<0>();
  block_sync();
  XORZ_NO_UNROLL
  for (uint32_t s = 0; s * kStepColumns < shared.pair.columns; s++)
    patch.step(shared.w[s], start + s * kStepColumns);
  if (tiled) patch.pass_over(view.tile_cols());
  patch.end(&shared.corrupt);
}

// f(r0, panel) for each panel of W, whose strip is in `shared.w`. The block calls.
template <class Patch, class W, class F>
XORZ_DEVICE void each_panel(GradShared<W>& shared, const Product<W>& p, const W* words, F f) {
  XORZ_NO_UNROLL
  for (uint64_t r0 = 0; r0 < p.n; r0 += kRowsOfW) {
    const uint32_t panel = p.n - r0 < kRowsOfW ? static_cast<uint32_t>(p.n - r0) : kRowsOfW;
    fetch_strip<Patch>(shared, p, words, r0, panel);
    block_sync();
    f(static_cast<uint32_t>(r0), panel);
  }
}

// What the sums are, to x's gradient. NaN with all bits set stands for what is to be computed again. The block calls.
template <class D, class Sums>
XORZ_DEVICE bool write_grads(GradShared<typename D::Word>& shared, const Product<typename D::Word>& p,
                             const Sums& sums) {
  using W = typename D::Word;
  const GradPair& pair = shared.pair;
  const bool lost = shared.tenant.way == kRefused || shared.corrupt != 0;
  bool again = false;
  sums.each([&](uint32_t j, uint32_t c, float sum) {
    if (j >= pair.count || c >= pair.columns) return;
    W* to = p.out + shared.rows[j] * p.k + pair.c0 + c;
    if (!lost && finite(sum)) {
      store(to, D::round(sum));
      return;
    }
    store(to, nan_word<W>());
    if (lost) return;
    shared_or(&shared.again[j / 32], 1u << (j % 32));
    again = true;
  });
  return again;
}

// Compute again, in f64, the outputs that `write_grads` left. A thread has a column. The block calls.
template <class D, class Patch>
XORZ_DEVICE void compute_grads_again(GradShared<typename D::Word>& shared, const Product<typename D::Word>& p,
                                     const typename D::Word* words) {
  using W = typename D::Word;
  constexpr uint32_t kTogether = 4;
  const uint32_t c = thread_index_anew();
  uint32_t next = 0;
  XORZ_NO_UNROLL
  while (true) {
    uint32_t rows[kTogether], count = 0;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kTogether; i++) {
      while (next < kRowsOfGrad && (shared.again[next / 32] >> (next % 32) & 1) == 0) next++;
      rows[i] = next < kRowsOfGrad ? shared.rows[next] : 0;
      if (next < kRowsOfGrad) {
        next++;
        count++;
      }
    }
    if (count == 0) return;
    double sum[kTogether] = {};
    each_panel<Patch>(shared, p, words, [&](uint32_t r0, uint32_t panel) {
      if (c >= shared.pair.columns) return;
      XORZ_NO_UNROLL
      for (uint32_t r = 0; r < panel; r++) {
        const W word = shared.w[c / kStepColumns][Stages<W>::word_at(r, c % kStepColumns)];
        XORZ_UNROLL
        for (uint32_t i = 0; i < kTogether; i++)
          if (i < count)
            sum[i] += static_cast<double>(D::value(load_once(p.x + rows[i] * p.n + r0 + r))) *
                      static_cast<double>(D::value(word));
      }
    });
    XORZ_UNROLL
    for (uint32_t i = 0; i < kTogether; i++) {
      W* to = p.out + rows[i] * p.k + shared.pair.c0 + c;
      if (i < count && c < shared.pair.columns && load(to) == nan_word<W>()) store(to, round_f64<D>(sum[i]));
    }
  }
}

// The pair's outputs, of a tenant whose words are `words`, patched. The block calls.
template <class D, class Patch>
XORZ_DEVICE void grad_of_pair(GradShared<typename D::Word>& shared, const Product<typename D::Word>& p,
                              const typename D::Word* words) {
  const uint32_t n = static_cast<uint32_t>(p.n);
  typename GradsOf<D>::Type sums;
  sums.clear();
  each_panel<Patch>(shared, p, words, [&](uint32_t r0, uint32_t panel) {
    XORZ_NO_UNROLL
    for (uint32_t r = 0; r < panel; r += kHalfPanel) {
      const auto row_of = [&](uint32_t j) {
        return j < shared.pair.count ? p.x + shared.rows[j] * p.n : nullptr;
      };
      if (r != 0) block_sync();
      stage_columns(shared.grad, row_of, r0 + r, n);
      copies_end_group();
      wait_for_copies<0>();
      block_sync();
      sums.step(shared.grad, shared.w, r, shared.pair.count);
    }
  });
  block_sync();
  if (block_any(write_grads<D>(shared, p, sums))) compute_grads_again<D, Patch>(shared, p, words);
  if (thread_index_anew() == 0 && shared.corrupt != 0)
    report(p.status, kTileCorrupt, p.slots == nullptr ? 0 : static_cast<uint32_t>(shared.tenant.slot));
}

// The pair's tenant and rows to shared memory; false where the tile has no such rows. The block calls.
template <class W>
XORZ_DEVICE bool fetch_grad_pair(GradShared<W>& shared, const Product<W>& p, const Workspace& work) {
  constexpr uint32_t kParts = kRowsOfX<W> / kRowsOfGrad;
  const uint32_t thread = thread_index_anew();
  GradPair& pair = shared.pair;
  const Vector record = load_vector_once(work.tiles + pair.tile);
  const uint32_t before = pair.at % kParts * kRowsOfGrad;
  if (record.part[2] <= before) return false;
  const uint32_t first = record.part[1] + before, left = record.part[2] - before;
  const uint32_t count = left < kRowsOfGrad ? left : kRowsOfGrad;
  if (thread < sizeof(TenantRows) / 16)
    store_shared(reinterpret_cast<Vector*>(&shared.tenant) + thread,
                 load_vector_once(reinterpret_cast<const Vector*>(work.tenants + record.part[0]) + thread));
  if (thread < count) shared.rows[thread] = load_once(work.order + first + thread);
  if (thread < kRowsOfGrad / 32) shared.again[thread] = 0;
  block_sync();
  if (thread == 0) {
    shared.corrupt = 0;
    shared.tenant.view.bytes = p.arena + shared.tenant.offset;
    pair.c0 = pair.at / kParts * kStripColumns<W>;
    pair.columns = p.k - pair.c0 < kStripColumns<W> ? static_cast<uint32_t>(p.k - pair.c0) : kStripColumns<W>;
    pair.count = count;
  }
  block_sync();
  return true;
}

template <class D>
XORZ_DEVICE void linear_grad(GradShared<typename D::Word>& shared, const Product<typename D::Word>& p,
                             uint8_t* workspace) {
  using W = typename D::Word;
  constexpr uint32_t kParts = kRowsOfX<W> / kRowsOfGrad;
  const Workspace work = workspace_of(p, workspace);
  const uint32_t tiles = load_once(work.tile_count);
  if (tiles == 0) return;
  GradPair& pair = shared.pair;
  if (thread_index_anew() == 0) {
    pair.at = block_x() / tiles;
    pair.tile = block_x() % tiles;
  }
  block_sync();
  XORZ_NO_UNROLL
  while (static_cast<uint64_t>(pair.at / kParts) * kStripColumns<W> < p.k) {
    if (fetch_grad_pair(shared, p, workspace_of(p, workspace))) {
      const View& view = shared.tenant.view;
      const uint32_t way = shared.tenant.way;
      if (way == kOnEntries) {
        grad_of_pair<D, PatchEntries<D, true>>(shared, p, p.weight);
      } else if (way == kOnStream) {
        grad_of_pair<D, PatchStreams<D, true>>(shared, p, p.weight);
      } else if (way == kRefused) {
        typename GradsOf<D>::Type none;
        none.clear();
        write_grads<D>(shared, p, none);
      } else {
        grad_of_pair<D, NoPatch>(
            shared, p, way == kOnOwnWords ? reinterpret_cast<const W*>(view.bytes + view.payload) : p.weight);
      }
    }
    block_sync();
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
#define XORZ_LINEAR_GRAD(name, D)                                                                           \
  XORZ_KERNEL(256, 1)                                                                                       \
  xorz_linear_grad_##name(const xorz::D::Word* x, const xorz::D::Word* weight, const xorz::D::Word* biases, \
                          uint64_t bias_stride, const uint8_t* arena, uint64_t arena_bytes,                 \
                          const int64_t* slots, uint64_t slot_count, const int32_t* tenant_of_row,          \
                          xorz::D::Word* out, uint64_t m, uint64_t n, uint64_t k, uint32_t* status,         \
                          uint8_t* workspace) {                                                             \
    XORZ_SHARED xorz::GradShared<xorz::D::Word> shared;                                                     \
    xorz::linear_grad<xorz::D>(shared,                                                                      \
                               {x, weight, biases, bias_stride, arena, arena_bytes, slots, slot_count,      \
                                tenant_of_row, out, m, n, k, status},                                       \
                               workspace);                                                                  \
  }

XORZ_LINEAR_GRAD(bf16, Bf16)
XORZ_LINEAR_GRAD(f16, F16)
XORZ_LINEAR_GRAD(f32, F32)
