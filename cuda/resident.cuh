// A resident delta in device memory (src/resident/SPEC.md), read and checked where it lies: nothing of it is
// known to the host. One thread opens it once a block; every size it announces is compared with the bytes
// there are, so that a tile is always handed out within bounds. What it says of a base (digests) is for the
// host to check.
#pragma once

#include "word.cuh"

namespace xorz {

// Constants of the layout; tests/rust/cuda/kernels.rs compares them with the core's.
constexpr uint32_t kHeaderBytes = 192;
constexpr uint32_t kVersion = 1;
constexpr uint32_t kSectionAlign = 64;
constexpr uint32_t kArenaAlign = 64;
constexpr uint32_t kTileLanes = 16;      // rows of a `sparse` tile
constexpr uint32_t kStreamLanes = 32;    // lanes of an `exponent` tile
constexpr uint32_t kClasses = 32;        // classes of base words
constexpr uint32_t kMaxTileCols = 4096;  // columns of the widest tile
constexpr uint32_t kMaxTileWordsLog2 = 16;

enum Encoding : uint32_t { kUnchanged = 0, kSparse = 1, kExponent = 2, kRaw = 3 };

// What a kernel reports, worst last; 0 is well.
enum Status : uint32_t {
  kOk = 0,
  kTileCorrupt = 1,  // a tile contradicts itself or the base
  kNoTenant = 2,     // a row names a slot that does not exist
  kBadSlot = 3,      // a slot lies outside of the arena, or not at a multiple of 64
  kMisaligned = 4,   // a delta at an address that is no multiple of 16
  kNotADelta = 5,    // no magic, an unknown version, or a header that contradicts itself or the length
  kMismatch = 6,     // a delta of another dtype or shape than the base
  kNoRow = 7,        // an index lies outside of the table
  kOldLayout = 8,    // an `exponent` delta of layout 0: products need entries, which it has not
  kOtherBase = 9,    // a sound delta of other words than the matrix has, says the digest (digest.cu)
};

// The status word: the status in the high 8 bits, the slot (0 where there is but one delta) in the others; of
// kNoRow, which index. The largest is kept, so that it does not depend on which thread came first.
XORZ_DEVICE void report(uint32_t* status, uint32_t code, uint32_t slot) {
  raise_to(status, code << 24 | (slot & 0xFFFFFFu));
}

// An opened delta. SPEC.md's entries of `exponent` are called differences here: entries are those of `sparse`.
struct View {
  const uint8_t* bytes;
  uint32_t units, exceptions, differences;
  uint32_t gap_bytes;
  // Offsets of the sections; the first one is the directory, behind the header.
  uint64_t payload, exception_directory, exception_positions, exception_words;
  uint64_t difference_directory, difference_positions;
  // Tiles of the matrix, and tiles of one row of tiles.
  uint32_t tiles, across;
  uint64_t n, k;
  uint32_t encoding, dtype;
  uint32_t rows_log2, cols_log2;

  XORZ_DEVICE uint32_t tile_rows() const { return 1u << rows_log2; }
  XORZ_DEVICE uint32_t tile_cols() const { return 1u << cols_log2; }
  XORZ_DEVICE const uint8_t* widths() const { return bytes + 128; }
};

// The part of the matrix that a tile covers; never empty.
struct Rect {
  uint64_t r0, c0;
  uint32_t rows, cols;
};

XORZ_DEVICE Rect rect_of(const View& v, uint32_t tile) {
  Rect rect;
  rect.r0 = static_cast<uint64_t>(tile / v.across) << v.rows_log2;
  rect.c0 = static_cast<uint64_t>(tile % v.across) << v.cols_log2;
  const uint64_t rows = v.n - rect.r0, cols = v.k - rect.c0;
  rect.rows = rows < v.tile_rows() ? static_cast<uint32_t>(rows) : v.tile_rows();
  rect.cols = cols < v.tile_cols() ? static_cast<uint32_t>(cols) : v.tile_cols();
  return rect;
}

struct Span {
  uint32_t from, to;
};

// Entries `tile` and `tile + 1` of a directory; false where they contradict what the header says. `tile <
// v.tiles`.
XORZ_DEVICE bool span_of(const View& v, uint64_t directory, uint32_t tile, uint64_t limit, Span& span) {
  const uint32_t* at = reinterpret_cast<const uint32_t*>(v.bytes + directory) + tile;
  span.from = load_once(at);
  span.to = load_once(at + 1);
  return span.from <= span.to && span.to <= limit;
}

// Columns that a tile has at most, and words. Sound tiles store no more than follows from them, and tiles that claim more
// are refused before they are walked: however a forged directory overlaps itself, the work on a delta is bounded by its
// matrix.
XORZ_DEVICE uint32_t columns_of_tile(const View& v) {
  return v.k < v.tile_cols() ? static_cast<uint32_t>(v.k) : v.tile_cols();
}
XORZ_DEVICE uint32_t words_of_tile(const View& v) {
  const uint32_t rows = v.n < v.tile_rows() ? static_cast<uint32_t>(v.n) : v.tile_rows();
  return rows * columns_of_tile(v);
}

// Which units are a tile's, of which no sound one has more than `most`.
XORZ_DEVICE bool units_of(const View& v, uint32_t tile, uint32_t most, Span& span) {
  return span_of(v, kHeaderBytes, tile, v.units, span) && span.to - span.from <= most;
}
// Those of a stream, of which no word takes more than one.
XORZ_DEVICE bool units_of(const View& v, uint32_t tile, Span& span) {
  return units_of(v, tile, words_of_tile(v), span);
}

// Where a section begins that follows one that ends at `end`.
XORZ_DEVICE uint64_t section_after(uint64_t end) {
  return (end + kSectionAlign - 1) / kSectionAlign * kSectionAlign;
}

// What tiles store apart: where the lists lie, and how long they are.
struct Listing {
  uint64_t directory, positions, words;
  uint32_t count;
  uint32_t of_word;  // how many a word may have
};

XORZ_DEVICE Listing exceptions_in(const View& v) {
  return {v.exception_directory, v.exception_positions, v.exception_words, v.exceptions, 1};
}

XORZ_DEVICE Listing differences_in(const View& v) {
  const uint64_t words = section_after(v.difference_positions + 2 * static_cast<uint64_t>(v.differences));
  return {v.difference_directory, v.difference_positions, words, v.differences, 2};
}

XORZ_DEVICE bool listed_of(const View& v, const Listing& list, uint32_t tile, Span& span) {
  span = {0, 0};
  return list.count == 0 || (span_of(v, list.directory, tile, list.count, span) &&
                             span.to - span.from <= list.of_word * words_of_tile(v));
}

// What of a header is looked at, in registers: all of it is asked for before any of it is waited for.
struct Header {
  Vector part[kHeaderBytes / 16];

  XORZ_DEVICE explicit Header(const uint8_t* bytes) {
    XORZ_UNROLL
    for (uint32_t i = 0; i < kHeaderBytes / 16; i++) part[i] = load_vector_once(bytes + 16 * i);
  }
  XORZ_DEVICE uint64_t word(uint32_t i) const {
    return part[i / 2].part[i % 2 * 2] | static_cast<uint64_t>(part[i / 2].part[i % 2 * 2 + 1]) << 32;
  }
  // Whether no width is wider than `bits`, which are at most 64.
  XORZ_DEVICE bool widths_within(uint32_t bits) const {
    uint32_t over = 0;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kClasses / 4; i++) {
      const uint32_t four = part[8 + i / 4].part[i % 4];
      over |= four | (four + (0x7F - bits) * 0x01010101u);
    }
    return (over & 0x80808080u) == 0;
  }
};

// Open `length` bytes that shall be the delta of an n x k matrix of `dtype`, or of any dtype where that is 0.
// Reads nothing beyond them.
XORZ_DEVICE uint32_t open_delta(const uint8_t* bytes, uint64_t length, uint64_t n, uint64_t k, uint32_t dtype,
                                View& v) {
  if (length < kHeaderBytes) return kNotADelta;
  if (!aligned(bytes, 16)) return kMisaligned;
  const Header header(bytes);
  if (header.word(0) != 0x00544C445A524F58ull) return kNotADelta;  // "XORZDLT\0"
  const uint64_t codes = header.word(1);
  const auto code = [codes](uint32_t at) { return static_cast<uint32_t>(codes >> (8 * (at - 8))) & 0xFF; };
  v.encoding = code(10);
  v.dtype = code(11);
  v.rows_log2 = code(12);
  v.cols_log2 = code(13);
  v.gap_bytes = code(14);
  const uint32_t word = word_bytes_of(v.dtype), version = static_cast<uint32_t>(codes & 0xFFFF);
  if (version > kVersion || v.encoding > kRaw || word == 0 || code(15) != 0) return kNotADelta;
  v.n = header.word(2);
  v.k = header.word(3);
  if ((dtype != 0 && v.dtype != dtype) || v.n != n || v.k != k) return kMismatch;
  if (v.cols_log2 < 8 || v.cols_log2 > 12 || v.rows_log2 < 4 ||
      v.rows_log2 > kMaxTileWordsLog2 - v.cols_log2 || (v.encoding == kSparse && v.rows_log2 != 4) ||
      v.gap_bytes < 1 || v.gap_bytes > 2)
    return kNotADelta;
  if (version == 0 && v.encoding == kExponent) return kOldLayout;
  const uint64_t total = header.word(4), changed = header.word(5);
  const uint64_t exceptions = header.word(6), units = header.word(7);
  const uint64_t differences = header.word(13);
  const bool tiled = v.encoding == kSparse || v.encoding == kExponent;
  const uint64_t matrix = n * k;
  if (changed > matrix || exceptions > matrix || differences > 2 * matrix ||
      (units | exceptions | differences) >> 32 || (!tiled && (units | exceptions)) ||
      (differences != 0 && (v.encoding != kExponent || !computes(v.dtype))))
    return kNotADelta;
  v.exceptions = static_cast<uint32_t>(exceptions);
  v.units = static_cast<uint32_t>(units);
  v.differences = static_cast<uint32_t>(differences);
  if (!header.widths_within(8 * word)) return kNotADelta;
  v.bytes = bytes;
  // Tiles are counted in 32 bits: divisions of 64 bits are calls on a GPU, and a matrix of more has 4096 GiB.
  const uint64_t across = (k + v.tile_cols() - 1) >> v.cols_log2;
  const uint64_t tiles = across * ((n + v.tile_rows() - 1) >> v.rows_log2);
  if (tiles >> 32) return kNotADelta;
  v.across = static_cast<uint32_t>(across);
  v.tiles = static_cast<uint32_t>(tiles);
  // Sections one after the other, each at the next multiple of 64. Nothing here overflows: tiles and
  // exceptions are no more than the matrix's words, units and differences no more than 2^32.
  const uint64_t directory = tiled ? 4 * (tiles + 1) : 0;
  const uint64_t unit = v.encoding == kSparse ? kTileLanes * (v.gap_bytes + word) : word;
  v.payload = section_after(kHeaderBytes + directory);
  v.difference_directory = section_after(v.payload + (v.encoding == kRaw ? matrix * word : units * unit));
  v.difference_positions = section_after(v.difference_directory + (differences ? directory : 0));
  v.exception_directory = section_after(differences_in(v).words + word * differences);
  v.exception_positions = section_after(v.exception_directory + (exceptions ? directory : 0));
  v.exception_words = section_after(v.exception_positions + 2 * exceptions);
  const uint64_t end = section_after(v.exception_words + word * exceptions);
  const uint64_t offsets[5] = {kHeaderBytes, v.payload, v.exception_directory, v.exception_positions,
                               v.exception_words};
  bool sound = total == end && length == end;
  XORZ_UNROLL
  for (uint32_t i = 0; i < 5; i++) sound = sound && header.word(8 + i) == offsets[i];
  // Layout 0 knows no differences.
  sound = sound && header.word(22) == (version == 0 ? 0 : v.difference_directory) &&
          header.word(23) == (version == 0 ? 0 : v.difference_positions) &&
          (version != 0 || differences == 0);
  return sound ? kOk : kNotADelta;
}

}  // namespace xorz
