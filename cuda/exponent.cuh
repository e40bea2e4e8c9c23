// The bit streams of an `exponent` tile: a warp is its 32 lanes.
//
//   steps (up to four at once, of 32 columns of one row each, lane l the l-th of each):
//     for each, before any bit is looked at:
//       w     = widths[class of the base word]                    0 where the lane has no column
//       takes = ballot(lane holds fewer than w bits)              who takes the next units, in the order of lanes
//       unit  = stream[at + lanes below me that take]; at += popc(takes)
//     for each: v = the lane's next w bits;  word = base + v - 2^(w-1)
//
// The chain from step to step is held -> ballot -> at: no memory, so that units of four steps are asked for at once, each by the lane
// that takes it. They lie side by side, and what one step leaves of a sector comes to the next one from L1.
// Registers of a lane: bits 1 (2 for words of 4 and 8 bytes), held 1, position 1, width 1, place of the units 3; of four steps 12.
#pragma once

#include "resident.cuh"

namespace xorz {

// What registers hold words of W in: parts of registers cost instructions. And a lane's bits: fewer than a word's, and a
// unit above them, which words of 8 bytes leave no room for.
template <class W>
struct InRegisters {
  using Word = uint32_t;
  using Bits = uint32_t;
};
template <>
struct InRegisters<uint32_t> {
  using Word = uint32_t;
  using Bits = uint64_t;
};
template <>
struct InRegisters<uint64_t> {
  using Word = uint64_t;
  using Bits = uint64_t;
};

template <class W>
class Stream {
  using Word = typename InRegisters<W>::Word;
  using Bits = typename InRegisters<W>::Bits;
  static constexpr uint32_t kBits = 8 * sizeof(W);
  static constexpr uint32_t kAhead = 256;  // units

  const W* units_;
  uint32_t count_;
  uint32_t at_;    // units that were taken, or would have been
  Bits bits_;      // the lane's bits, the next one lowest; none above them
  uint32_t held_;  // how many: fewer than a word's
  uint32_t width_of_class_;
  uint32_t shift_;

  // base + v - 2^(w-1), v the lane's next w bits, w > 0; `fresh` is its next unit, if it takes one above the `held` it has.
  XORZ_DEVICE W long_word(W base, uint32_t w, uint32_t held, Bits fresh) {
    const bool takes = held < w;
    const Bits mask = ~Bits(0) >> (8 * sizeof(Bits) - w), half = Bits(1) << (w - 1);
    const Bits all = takes ? bits_ | fresh << held : bits_;
    const uint32_t used = takes ? w - held : w;
    bits_ = (takes ? fresh : bits_) >> (used - 1) >> 1;
    return static_cast<W>(base + static_cast<W>(all & mask) - static_cast<W>(half));
  }

 public:
  // At the first word of `tile`; false where the directory contradicts itself. The whole warp calls.
  XORZ_DEVICE bool begin(const View& v, uint32_t tile) {
    Span span;
    if (!units_of(v, tile, span)) return false;
    units_ = held(reinterpret_cast<const W*>(v.bytes + v.payload) + span.from);
    count_ = span.to - span.from;
    at_ = held_ = 0;
    bits_ = 0;
    width_of_class_ = load_once(v.widths() + thread_index() % kStreamLanes);
    shift_ = mantissa_bits_of(v.dtype, sizeof(W));
    return true;
  }

  // Of base words of steps side by side: the fine-tuned ones, exceptions apart. Bit i of `live` says that the lane has a column in
  // step i; kWhole: in all. The whole warp calls. Where the stream has ended, its units are zeros (see `sound`).
  template <uint32_t kSteps, bool kWhole>
  XORZ_DEVICE void steps(Word (&words)[kSteps], uint32_t live) {
    const uint32_t below = (1u << (thread_index() % kStreamLanes)) - 1;
    uint32_t width[kSteps], held[kSteps];
    Bits fresh[kSteps];
    XORZ_UNROLL
    for (uint32_t i = 0; i < kSteps; i++) {
      const uint32_t of_class =
          warp_shuffle_modulo(width_of_class_, static_cast<uint32_t>(words[i] >> shift_));
      width[i] = kWhole || (live >> i & 1) != 0 ? of_class : 0;
      held[i] = held_;
      const bool takes = held_ < width[i];
      const uint32_t takers = warp_ballot(takes), mine = at_ + bit_count(takers & below);
      fresh[i] = takes && mine < count_ ? Bits(load_once(units_ + mine)) : Bits(0);
      at_ += bit_count(takers);
      held_ += (takes ? kBits : 0) - width[i];
    }
    XORZ_UNROLL
    for (uint32_t i = 0; i < kSteps; i++) {
      if constexpr (sizeof(W) == 8) {
        if (width[i] != 0) words[i] = long_word(words[i], width[i], held[i], fresh[i]);
      } else {
        // Without a branch: a width of 0 takes no bits and adds nothing.
        bits_ |= fresh[i] << held[i];
        const Bits over = Bits(1) << width[i];
        words[i] =
            static_cast<W>(words[i] + static_cast<Word>(bits_ & (over - 1)) - static_cast<Word>(over >> 1));
        bits_ >>= width[i];
      }
    }
  }

  // One step: the fine-tuned word of the lane's base word; `live` where the lane has a column.
  XORZ_DEVICE W step(W base, bool live) {
    Word words[1] = {base};
    steps<1, false>(words, live);
    return static_cast<W>(words[0]);
  }

  // The units that steps will take that are not the next ones come to L2 meanwhile.
  XORZ_DEVICE void fetch_ahead_units() {
    if (at_ + kAhead < count_) fetch_ahead(units_ + at_ + kAhead);
  }

  // Whether no more units were used than there are, and, at the tile's end, all of them.
  XORZ_DEVICE bool sound(bool at_end) const { return at_end ? at_ == count_ : at_ <= count_; }
};

}  // namespace xorz
