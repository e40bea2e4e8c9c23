// delta_linear and delta_linear_grouped for few rows of x: y = x @ (base (+) delta)^T + bias, up to M rows of
// x a block, each of any tenant. f32 sums in a fixed order, no float atomics, no scratch memory.
//
//   block (i, j): rows 16 i .. of W (a panel), rows M j .. of x
//     sort the rows by tenant, ask for the panel's first columns, open the tenants' deltas (batch.cuh)
//     rows on the base's words (the base, `unchanged`, `sparse`), together: panel x rows in registers
//       (f32: product.cuh; bf16 and f16: product_tensor.cuh)
//     each tenant with words of its own (`raw`): the same on its payload
//     `sparse` tenants: their entries (entries.cuh)
//     `exponent` tenants: decode and multiply, a warp a tile (streams.cuh)
//     total + bias: finite -> round once -> y;  else again from the fine-tuned words in f64 (again_f64.cuh)
//
// The order of one output is that of the parts above, each documented in its file: total = 0; + base (or own)
// product; + entries; or + streams, tile column after tile column; + bias; one rounding to the dtype. Same
// call, same bits; a row's bits may depend on which tenants share its block of rows, never on another row's
// values. Payloads of NaN that are computed are unspecified; refused and corrupt deltas give all bits set.
//
// Bytes: base words once (`exponent` beside other kinds of rows in the same block: again, from L2, and what tenants
// share of it from L1), each tenant's tiles of the panel once (gaps of one byte again, from L1), x once a panel for
// each part, from L2. Threads 256. Shared memory: see gate.txt: 32 KiB of staged words, 2.5 KiB of runs, 2 KiB of totals,
// up to 16 open deltas.
#include "again_f64.cuh"
#include "entries.cuh"
#include "product_tensor.cuh"

namespace xorz {
namespace {

template <class W, uint32_t M>
struct LinearShared {
  Batch<M> batch;
  float total[kPanel][M];
  uint32_t list[M];
  // Parts of the computation come one after another.
  union {
    float partial[kPanel][M];
    TensorPartial<M> partials;
    struct {
      Round<W> round;
      Runs runs;
      EntryRows<M> rows;
    } entries;
    StreamSums<M> streams;
    struct {
      W words[kMaxTileCols];
      AgainF64<M> f64;
    } again;
  };
};

// The first columns of the panel come to L2 while deltas are opened, where a tenant's delta is too short to hold all words itself.
// The whole block calls.
template <class W, uint32_t M>
XORZ_DEVICE void fetch_base_ahead(const Batch<M>& batch, const Product<W>& p, uint64_t r0, uint32_t panel) {
  const uint32_t thread = thread_index_anew(), tenant = thread % 32;
  bool on_base = false;
  if (tenant < batch.tenants) {
    const int32_t slot = batch.slot[tenant];
    uint64_t bytes = p.slots == nullptr ? p.arena_bytes : 0;
    if (p.slots != nullptr && slot >= 0 && static_cast<uint64_t>(slot) < p.slot_count)
      bytes = static_cast<uint64_t>(load_once(p.slots + 2 * static_cast<uint64_t>(slot) + 1));
    on_base = bytes < p.n * p.k * sizeof(W);
  }
  if (warp_ballot(on_base) == 0) return;
  const uint32_t row = thread / kPanel, column = thread % kPanel * static_cast<uint32_t>(128 / sizeof(W));
  if (row < panel && column < p.k) fetch_ahead(p.weight + (r0 + row) * p.k + column);
}

template <class D, uint32_t M>
XORZ_DEVICE void linear_small(LinearShared<typename D::Word, M>& shared, const Product<typename D::Word>& p) {
  using W = typename D::Word;
  const uint32_t thread = thread_index();
  const uint64_t r0 = static_cast<uint64_t>(block_x()) * kPanel, m0 = static_cast<uint64_t>(block_y()) * M;
  if (r0 >= p.n || m0 >= p.m) return;
  const uint32_t panel = p.n - r0 < kPanel ? static_cast<uint32_t>(p.n - r0) : kPanel;
  const uint32_t rows = p.m - m0 < M ? static_cast<uint32_t>(p.m - m0) : M;
  Batch<M>& batch = shared.batch;
  if (thread < kPanel * M) shared.total[thread / M][thread % M] = 0;
  gather_batch<D, M>(batch, p, m0, rows, [&] { fetch_base_ahead(batch, p, r0, panel); });
  fetch_entries_ahead<W>(batch, r0);
  const W* x = p.x + m0 * p.k;

  // Products of panels of words: the base's for all that are computed on it, then each tenant's own.
  XORZ_NO_UNROLL
  for (uint32_t t = 0; t <= batch.tenants; t++) {
    const W* words = p.weight + r0 * p.k;
    uint32_t count = 0;
    block_sync();
    if (t == 0) {
      const uint32_t at = thread % 32, rows_of_all = batch.first[batch.tenants];
      const uint32_t way = at < rows_of_all ? batch.way[batch.owner[at % M]] : kRefused;
      const uint32_t on_base = warp_ballot(way == kOnBase || way == kOnEntries);
      count = bit_count(on_base);
      if (thread < 32 && (on_base >> at & 1) != 0)
        shared.list[bit_count(on_base & ((1u << at) - 1))] = batch.order[at % M];
    } else if (batch.way[t - 1] == kOnOwnWords) {
      const View& v = batch.view[t - 1];
      words = reinterpret_cast<const W*>(v.bytes + v.payload) + r0 * p.k;
      count = batch.rows(t - 1);
      if (thread < count) shared.list[thread] = batch.order[batch.first[t - 1] + thread];
    }
    block_sync();
    if (count == 0) continue;  // hot: tenants
    const uint32_t k = static_cast<uint32_t>(p.k);
    float (&total)[kPanel][M] = shared.total;
    if constexpr (sizeof(W) == 2)
      add_product_by_tensor<D>(total, shared.partials, words, k, panel, x, shared.list,
                               count);  // each: product
    else
      add_product<D>(total, shared.partial, words, k, panel, x, shared.list, count);  // each: product
  }
  auto& entries = shared.entries;
  add_entries<D>(shared.total, entries.rows, entries.round, entries.runs, batch, x,
                 static_cast<uint32_t>(p.k),
                 r0);  // each: entries
  block_sync();
  add_streams<D, M>(shared.total, shared.streams, batch, p.weight, x, r0);  // each: streams

  AgainF64<M>& f64 = shared.again.f64;
  if (thread < kPanel) f64.again[thread] = 0;
  block_sync();
  bool again = false;
  XORZ_NO_UNROLL
  for (uint32_t t = 0; t < batch.tenants; t++) {
    const bool refused = batch.way[t] == kRefused || batch.corrupt[t] != 0;
    if (thread == 0 && batch.way[t] != kRefused && batch.corrupt[t] != 0)
      report(p.status, kTileCorrupt, p.slots == nullptr ? 0 : static_cast<uint32_t>(batch.slot[t]));
    // 16 outputs that lie side by side for each row of x.
    for (uint32_t i = thread; i < batch.rows(t) * kPanel; i += kWarps * 32) {
      const uint32_t r = i % kPanel, j = batch.order[batch.first[t] + i / kPanel];
      if (r >= panel) continue;
      float value = shared.total[r][j];  // each: outputs
      if (p.biases != nullptr && !refused)
        value += D::value(load_once(p.biases + bias_row(p, batch.slot[t]) + r0 + r));  // each: outputs
      W* to = p.out + (m0 + j) * p.n + r0 + r;                                         // each: outputs
      if (refused)
        store(to, nan_word<W>());
      else if (finite(value))
        store(to, D::round(value));  // each: outputs
      else {
        shared_or(&f64.again[r], 1u << j);
        again = true;
      }
    }
  }
  if (!block_any(again)) return;
  compute_again<D, M>(f64, shared.again.words, batch, p, m0, r0);  // cold: again
}

}  // namespace
}  // namespace xorz

// See README.md for the parameters. Two blocks a multiprocessor: 128 registers.
#define XORZ_LINEAR_SMALL(name, D, M)                                                                       \
  XORZ_KERNEL(256, 2)                                                                                       \
  xorz_linear_small_##name##_m##M(const xorz::D::Word* x, const xorz::D::Word* weight,                      \
                                  const xorz::D::Word* biases, uint64_t bias_stride, const uint8_t* arena,  \
                                  uint64_t arena_bytes, const int64_t* slots, uint64_t slot_count,          \
                                  const int32_t* tenant_of_row, xorz::D::Word* out, uint64_t m, uint64_t n, \
                                  uint64_t k, uint32_t* status) {                                           \
    XORZ_SHARED xorz::LinearShared<xorz::D::Word, M> shared;                                                \
    xorz::linear_small<xorz::D, M>(shared, {x, weight, biases, bias_stride, arena, arena_bytes, slots,      \
                                            slot_count, tenant_of_row, out, m, n, k, status});              \
  }

XORZ_LINEAR_SMALL(bf16, Bf16, 16)
XORZ_LINEAR_SMALL(f16, F16, 16)
XORZ_LINEAR_SMALL(f32, F32, 4)
XORZ_LINEAR_SMALL(f32, F32, 16)
