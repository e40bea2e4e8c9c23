// delta_restore and delta_apply_: the fine-tuned words of a matrix, or of a panel of its rows, bit for bit, every
// encoding, words of 1, 2, 4 and 8 bytes.
//
//   each block: open the delta (thread 0), refuse what does not fit
//   unchanged: copy the base (apply: nothing), 16 bytes a load
//   raw: copy the payload, 16 bytes a load
//   sparse, a tile of 16 rows a block:
//     copy the tile's base words (apply: they are there)
//     16 runs of records x 16 rows: a thread sums its run's gaps; runs begin where those before end
//     walk the run: base + difference(s) of one column, first to last, is its word
//     exceptions
//   exponent, a tile a warp, 2 KiB of a row at a time:
//     16-byte loads -> shared memory -> steps (exponent.cuh) -> 16-byte stores; meanwhile the next loads
//     differences (differences.cuh) when the tile is done, then exceptions
//
// Restore fills a tile that contradicts itself with NaN (all bits set), and the matrix where the delta does not fit; it
// reports. Apply is two launches: `verify` does all of the above but for the stores, reports, and writes a verdict a block;
// `apply` reads every verdict first, and does nothing unless all are 0. So no word has changed when something is wrong.
//
// Bytes: restore reads base + delta and writes n * k words; apply reads the delta and, of `sparse`, the
// 32-byte sectors with changes, which it also writes; verify reads the delta and, of `exponent`, the base, and
// 4 bytes a block of verify are read in each block of apply, from L2. 256 threads; shared memory 17.5 KiB (8 warps x
// 2 KiB of staged words, 1 KiB of sums). Registers: see gate.txt. Grid: any number of blocks is right; the launch asks
// for one a tile, of verify for 1024 at most.
#include "differences.cuh"
#include "exponent.cuh"
#include "words.cuh"

namespace xorz {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kRuns = kThreads / kTileLanes;
constexpr uint32_t kStage = 2048;                // bytes of a row that a warp stages
constexpr uint32_t kLoads = kStage / (32 * 16);  // 16-byte loads of a lane for them

// What is done with the words.
enum Work : uint32_t { kRestore, kApply, kVerify };

struct RestoreShared {
  Vector stage[kThreads / 32][kStage / 16];
  uint32_t sums[kRuns][kTileLanes];
  View view;
  uint32_t code;
  uint32_t corrupt;
  uint32_t refused;  // kVerify: a tile of this block was found corrupt
};

// A tile is corrupt. One thread calls.
template <Work kWork>
XORZ_DEVICE void report_tile(RestoreShared& shared, uint32_t* status) {
  if (kWork == kVerify) shared_or(&shared.refused, 1);
  report(status, kTileCorrupt, 0);
}

template <class W, Work kWork>
XORZ_DEVICE void sparse_tile(RestoreShared& shared, uint32_t tile, const W* base, W* out, uint32_t* status) {
  const View& v = shared.view;
  const Rect rect = rect_of(v, tile);
  const uint32_t thread = thread_index(), lane = thread % kTileLanes, i = thread / kTileLanes;
  W* corner = out + rect.r0 * v.k + rect.c0;
  if (kWork == kRestore) {
    for (uint32_t r = thread / 32; r < rect.rows; r += kThreads / 32)
      copy_words(corner + r * v.k, base + (rect.r0 + r) * v.k + rect.c0, rect.cols, thread % 32, 32);
  }
  if (thread == 0) shared.corrupt = 0;
  Records<W> records;
  const bool listed = records_of(v, tile, records);
  if (!listed) records.count = 0;
  const Span run = run_of(records.count, i, kRuns);
  const bool live = lane < rect.rows && run.from < run.to;
  shared.sums[i][lane] = listed && live ? gap_sum(records, lane, run) : 0;
  block_sync();
  bool sound = listed;
  if (listed && live) {
    uint32_t column = 0;
    for (uint32_t before = 0; before < i; before++) column += shared.sums[before][lane];  // hot: before
    const W* row = base + (rect.r0 + lane) * v.k + rect.c0;
    sound = patch_run<W, kWork != kVerify>(records, v.dtype, lane, run, column, rect.cols, row,
                                           corner + lane * v.k);
  }
  if (!sound) shared.corrupt = 1;
  block_sync();
  if (!patch_exceptions<W, kWork != kVerify>(v, tile, rect, out, thread, kThreads)) shared.corrupt = 1;
  block_sync();
  if (shared.corrupt) {
    if (kWork == kRestore) {
      for (uint32_t r = thread / 32; r < rect.rows; r += kThreads / 32)
        fill_nan(corner + r * v.k, rect.cols, thread % 32, 32);
    }
    if (thread == 0) report_tile<kWork>(shared, status);
  }
  block_sync();
}

// A warp's share of a row on its way from memory to shared memory.
template <class W>
struct Chunk {
  static constexpr uint32_t kWords = kStage / sizeof(W);
  static constexpr uint32_t kPer = 16 / sizeof(W);
  Vector held[kLoads];

  XORZ_DEVICE void fetch(const W* row, uint32_t cols, uint32_t from, uint32_t lane) {
    if (!aligned(row, 16)) return;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kLoads; i++) {
      const uint32_t c = from + (i * 32 + lane) * kPer;
      if (c + kPer <= cols) held[i] = load_vector(row + c);
    }
  }
  // What 16-byte loads cannot fetch goes word by word.
  XORZ_DEVICE void put(W* stage, const W* row, uint32_t cols, uint32_t from, uint32_t lane) const {
    uint32_t whole = 0;
    if (aligned(row, 16)) {
      XORZ_UNROLL
      for (uint32_t i = 0; i < kLoads; i++) {
        const uint32_t c = (i * 32 + lane) * kPer;
        if (from + c + kPer <= cols) store_shared(stage + c, held[i]);
      }
      whole = (cols - from) / kPer * kPer;
    }
    for (uint32_t c = whole + lane; c < kWords && from + c < cols; c += 32) stage[c] = load(row + from + c);
  }
};

template <class W, Work kWork>
XORZ_DEVICE void exponent_tile(RestoreShared& shared, uint32_t tile, const W* base, W* out,
                               uint32_t* status) {
  const View& v = shared.view;
  const Rect rect = rect_of(v, tile);
  const uint32_t lane = thread_index() % 32;
  W* stage = reinterpret_cast<W*>(shared.stage[thread_index() / 32]);
  constexpr uint32_t kWords = Chunk<W>::kWords, kSteps = 4;
  const W* from = (kWork == kRestore ? base : out) + rect.r0 * v.k + rect.c0;
  W* corner = out + rect.r0 * v.k + rect.c0;
  Stream<W> stream;
  bool sound = stream.begin(v, tile);
  if (sound) {
    Chunk<W> chunk;
    chunk.fetch(from, rect.cols, 0, lane);
    uint32_t r = 0, c = 0;
    while (r < rect.rows) {
      const W* row = from + r * v.k;
      chunk.put(stage, row, rect.cols, c, lane);
      const uint32_t next_c = c + kWords < rect.cols ? c + kWords : 0,
                     next_r = r + (next_c == 0);  // hot: chunk
      if (next_r < rect.rows) chunk.fetch(from + next_r * v.k, rect.cols, next_c, lane);
      warp_sync();
      const uint32_t count = rect.cols - c < kWords ? rect.cols - c : kWords;
      uint32_t s = 0;
      XORZ_NO_UNROLL
      for (; s + 32 * kSteps <= count; s += 32 * kSteps) {
        typename InRegisters<W>::Word words[kSteps];
        XORZ_UNROLL
        for (uint32_t i = 0; i < kSteps; i++) words[i] = stage[s + 32 * i + lane];
        stream.template steps<kSteps, true>(words, 0);
        XORZ_UNROLL
        for (uint32_t i = 0; i < kSteps; i++)
          stage[s + 32 * i + lane] = static_cast<W>(words[i]);  // hot: decoded
      }
      XORZ_NO_UNROLL
      for (; s < count; s += 32) {
        const bool live = s + lane < count;
        const W word = stream.step(live ? stage[s + lane] : W(0), live);  // each: pieces
        if (live) stage[s + lane] = word;
      }
      stream.fetch_ahead_units();
      warp_sync();
      W* to = corner + r * v.k + c;
      uint32_t whole = 0;
      if (kWork != kVerify && aligned(to, 16)) {
        whole = count / Chunk<W>::kPer * Chunk<W>::kPer;
        for (uint32_t i = lane * Chunk<W>::kPer; i < whole; i += 32 * Chunk<W>::kPer)
          store_vector(to + i, load_shared(stage + i));
      }
      if (kWork != kVerify)
        for (uint32_t i = whole + lane; i < count; i += 32) store(to + i, stage[i]);
      warp_sync();
      r = next_r;
      c = next_c;
    }
    sound = stream.sound(true);
  }
  warp_sync();
  const auto edit = [&](uint32_t r, uint32_t c, auto after) {
    W* word = corner + r * v.k + c;
    if (kWork != kVerify) store(word, after(load(word)));
  };
  sound = add_differences<W>(v, tile, rect, lane, 32, edit) && sound;
  warp_sync();
  sound = patch_exceptions<W, kWork != kVerify>(v, tile, rect, out, lane, 32) && sound;
  if (warp_ballot(!sound) != 0) {
    warp_sync();
    if (kWork == kRestore)
      for (uint32_t r = 0; r < rect.rows; r++) fill_nan(corner + r * v.k, rect.cols, lane, 32);
    if (lane == 0) report_tile<kWork>(shared, status);
  }
}

// Rows of a matrix, multiples of the tallest tile's but for the last.
struct Panel {
  uint64_t from, rows;
};

// All tiles of the panel that are the block's, each as `kWork` says. The delta fits. `out` is where row 0 would be.
template <class W, Work kWork>
XORZ_DEVICE void each_tile_of_block(RestoreShared& shared, const W* base, W* out, Panel panel,
                                    uint32_t* status) {
  const View& v = shared.view;
  const uint64_t first = panel.from * v.k, words = panel.rows * v.k;
  const uint64_t tile_from = (panel.from >> v.rows_log2) * v.across;
  const uint64_t past = ((panel.from + panel.rows + v.tile_rows() - 1) >> v.rows_log2) * v.across;
  const uint64_t tile_to = panel.rows == 0 ? tile_from : past;
  const uint64_t thread = static_cast<uint64_t>(block_x()) * kThreads + thread_index();
  const uint64_t threads = static_cast<uint64_t>(blocks_x()) * kThreads;
  switch (v.encoding) {
    case kUnchanged:
      if (kWork == kRestore) copy_words(out + first, base + first, words, thread, threads);
      break;
    case kRaw:
      if (kWork != kVerify)
        copy_words(out + first, reinterpret_cast<const W*>(v.bytes + v.payload) + first, words, thread,
                   threads);
      break;
    case kSparse:
      for (uint64_t tile = tile_from + block_x(); tile < tile_to; tile += blocks_x())
        sparse_tile<W, kWork>(shared, static_cast<uint32_t>(tile), base, out, status);
      break;
    default:
      // Tiles go to blocks first and to the warps of a block last: few tiles are spread over all processors.
      for (uint64_t tile = tile_from + block_x() + static_cast<uint64_t>(blocks_x()) * (thread_index() / 32);
           tile < tile_to; tile += static_cast<uint64_t>(blocks_x()) * (kThreads / 32))
        exponent_tile<W, kWork>(shared, static_cast<uint32_t>(tile), base, out, status);
  }
}

// Whether all verdicts are well. The block calls.
XORZ_DEVICE bool well(const uint32_t* verdicts, uint64_t count) {
  bool refused = false;
  for (uint64_t i = thread_index(); i < count; i += kThreads) refused |= load_once(verdicts + i) != 0;
  return !block_any(refused);
}

template <class W, Work kWork>
XORZ_DEVICE void restore(RestoreShared& shared, const W* base, W* out, const uint8_t* delta,
                         uint64_t delta_bytes, uint64_t n, uint64_t k, uint32_t dtype, Panel panel,
                         uint32_t* status) {
  if (thread_index() == 0) {
    shared.refused = 0;
    shared.code = open_delta(delta, delta_bytes, n, k, dtype, shared.view);
    if (shared.code == kOk && word_bytes_of(shared.view.dtype) != sizeof(W)) shared.code = kMismatch;
  }
  block_sync();
  if (shared.code == kOk) {
    each_tile_of_block<W, kWork>(shared, base, out, panel, status);
    return;
  }
  const uint64_t thread = static_cast<uint64_t>(block_x()) * kThreads + thread_index();
  if (kWork == kRestore)
    fill_nan(out + panel.from * k, panel.rows * k, thread, static_cast<uint64_t>(blocks_x()) * kThreads);
  if (thread == 0) report(status, shared.code, 0);
}

template <class W>
XORZ_DEVICE void verify(RestoreShared& shared, W* weight, const uint8_t* delta, uint64_t delta_bytes,
                        uint64_t n, uint64_t k, uint32_t dtype, uint32_t* status, uint32_t* verdicts,
                        uint64_t verdict_count) {
  restore<W, kVerify>(shared, weight, weight, delta, delta_bytes, n, k, dtype, {0, n}, status);
  block_sync();
  if (thread_index() == 0 && block_x() < verdict_count)
    store(verdicts + block_x(), shared.code != kOk ? 1u : shared.refused);
}

}  // namespace
}  // namespace xorz

// See README.md for the parameters.
#define XORZ_RESTORE(bits)                                                                                  \
  XORZ_KERNEL(256, 2)                                                                                       \
  xorz_delta_restore_##bits(const uint##bits##_t* base, uint##bits##_t* out, const uint8_t* delta,          \
                            uint64_t delta_bytes, uint64_t n, uint64_t k, uint32_t dtype, uint32_t* status, \
                            uint64_t row_from, uint64_t rows) {                                             \
    XORZ_SHARED xorz::RestoreShared shared;                                                                 \
    xorz::restore<uint##bits##_t, xorz::kRestore>(shared, base, out - row_from * k, delta, delta_bytes, n,  \
                                                  k, dtype, {row_from, rows}, status);                      \
  }                                                                                                         \
  XORZ_KERNEL(256, 2)                                                                                       \
  xorz_delta_verify_##bits(uint##bits##_t* weight, const uint8_t* delta, uint64_t delta_bytes, uint64_t n,  \
                           uint64_t k, uint32_t dtype, uint32_t* status, uint32_t* verdicts,                \
                           uint64_t verdict_count) {                                                        \
    XORZ_SHARED xorz::RestoreShared shared;                                                                 \
    xorz::verify<uint##bits##_t>(shared, weight, delta, delta_bytes, n, k, dtype, status, verdicts,         \
                                 verdict_count);                                                            \
  }                                                                                                         \
  XORZ_KERNEL(256, 2)                                                                                       \
  xorz_delta_apply_##bits(uint##bits##_t* weight, const uint8_t* delta, uint64_t delta_bytes, uint64_t n,   \
                          uint64_t k, uint32_t dtype, uint32_t* status, uint32_t* verdicts,                 \
                          uint64_t verdict_count) {                                                         \
    XORZ_SHARED xorz::RestoreShared shared;                                                                 \
    if (!xorz::well(verdicts, verdict_count)) return;                                                       \
    xorz::restore<uint##bits##_t, xorz::kApply>(shared, weight, weight, delta, delta_bytes, n, k, dtype,    \
                                                {0, n}, status);                                            \
  }

XORZ_RESTORE(8)
XORZ_RESTORE(16)
XORZ_RESTORE(32)
XORZ_RESTORE(64)
