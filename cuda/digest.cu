// The digest of a matrix's words (src/resident/SPEC.md, "Digests"), and whether they are the base of a delta.
//
//   leaves: a block of threads hashes 64 rows, then the next that are its own (xxh3.cuh)
//   root, one block: opens the delta if one is given; the dtype's code, n, k and the leaves are one run of bytes of the
//     workspace, which it hashes; then it compares the result with the delta's, or only stores it
//
// Order: leaves before root, on one stream. Of apply, root leaves a verdict among those of `verify` (restore.cu), which the
// launch that changes words reads before the first one changes: another base, and it does nothing.
//
// Bytes: the words once, 16 a leaf written and read again; of the delta, its header. Registers: see gate.txt. A matrix of n
// rows keeps ceil(n / 64) multiprocessors busy: 64 for 4096 rows; why not more, and what bounds one: xxh3.cuh. Grid of
// leaves: any number of blocks is right, meant is one a leaf.
#include "resident.cuh"
#include "xxh3.cuh"

namespace xorz {
namespace {

constexpr uint32_t kLeafRows = 64;
// Where in the workspace the run of bytes begins, so that leaves lie at multiples of 16: code 1, n 8, k 8, leaves.
constexpr uint32_t kRunAt = 15;
constexpr uint32_t kRunHead = 17;
constexpr uint32_t kLeavesAt = kRunAt + kRunHead;
// Where a delta's header has its base's digest.
constexpr uint32_t kBaseDigestAt = 112;

struct DigestShared {
  HashShared hash;
  View view;
  uint32_t code;
  uint32_t dtype;
};

XORZ_DEVICE uint64_t leaves_of(uint64_t n) { return (n + kLeafRows - 1) / kLeafRows; }

template <class Read>
XORZ_DEVICE void digest_leaves(HashShared& shared, const uint8_t* words, uint64_t n, uint64_t row_bytes,
                               uint8_t* workspace) {
  for (uint64_t leaf = block_x(); leaf < leaves_of(n); leaf += blocks_x()) {
    const uint64_t first = leaf * kLeafRows, rows = n - first < kLeafRows ? n - first : kLeafRows;
    hash<Read>(shared, words + first * row_bytes, rows * row_bytes);
    const uint32_t half = thread_index();
    if (half < 2)
      store(reinterpret_cast<uint64_t*>(workspace + kLeavesAt + 16 * leaf) + half, shared.digest[half]);
  }
}

// Opens the delta, if there is one, which shall be of such words: what of it does not fit. One thread calls.
XORZ_DEVICE uint32_t open(DigestShared& shared, uint64_t n, uint64_t k, uint32_t word_bytes, uint32_t dtype,
                          const uint8_t* delta, uint64_t delta_bytes) {
  shared.dtype = dtype;
  if (delta == nullptr) return kOk;
  const uint32_t code = open_delta(delta, delta_bytes, n, k, dtype, shared.view);
  if (code != kOk) return code;
  shared.dtype = shared.view.dtype;
  return word_bytes_of(shared.dtype) == word_bytes ? kOk : kMismatch;
}

// The bytes that precede the leaves.
XORZ_DEVICE uint8_t head_byte(uint32_t at, uint32_t dtype, uint64_t n, uint64_t k) {
  if (at == 0) return static_cast<uint8_t>(dtype);
  return static_cast<uint8_t>((at < 9 ? n : k) >> (8 * ((at - 1) % 8)));
}

XORZ_DEVICE bool is_base_of(const uint64_t (&digest)[2], const uint8_t* delta) {
  const uint64_t* wanted = reinterpret_cast<const uint64_t*>(delta + kBaseDigestAt);
  return load_once(wanted) == digest[0] && load_once(wanted + 1) == digest[1];
}

}  // namespace
}  // namespace xorz

// See README.md for the parameters.
XORZ_KERNEL(256, 2)
xorz_digest_leaves(const uint8_t* words, uint64_t n, uint64_t row_bytes, uint8_t* workspace) {
  XORZ_SHARED xorz::HashShared shared;
  // Every leaf begins as far from a multiple of 64 as the first.
  if (xorz::aligned(words, 16))
    xorz::digest_leaves<xorz::InOne>(shared, words, n, row_bytes, workspace);
  else
    xorz::digest_leaves<xorz::InPieces>(shared, words, n, row_bytes, workspace);
}

XORZ_KERNEL(256, 2)
xorz_digest_root(uint8_t* workspace, uint64_t n, uint64_t k, uint32_t word_bytes, uint32_t dtype,
                 const uint8_t* delta, uint64_t delta_bytes, uint32_t* status, uint32_t* verdict,
                 uint64_t* digest) {
  XORZ_SHARED xorz::DigestShared shared;
  const uint32_t thread = xorz::thread_index();
  if (thread == 0) shared.code = xorz::open(shared, n, k, word_bytes, dtype, delta, delta_bytes);
  xorz::block_sync();
  uint8_t* run = workspace + xorz::kRunAt;
  if (thread < xorz::kRunHead) xorz::store(run + thread, xorz::head_byte(thread, shared.dtype, n, k));
  xorz::block_sync();
  xorz::hash<xorz::AcrossTwo>(shared.hash, run, xorz::kRunHead + 16 * xorz::leaves_of(n));
  if (thread != 0) return;
  if (digest != nullptr) {
    xorz::store(digest, shared.hash.digest[0]);
    xorz::store(digest + 1, shared.hash.digest[1]);
  }
  uint32_t code = shared.code;
  if (delta != nullptr && code == xorz::kOk && !xorz::is_base_of(shared.hash.digest, delta))
    code = xorz::kOtherBase;
  if (verdict != nullptr) xorz::store(verdict, code == xorz::kOk ? 0u : 1u);
  if (code != xorz::kOk) xorz::report(status, code, 0);
}
