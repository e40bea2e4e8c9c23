// The bit streams of an `exponent` tile: a warp is its 32 lanes.
//
//   step (32 columns of one row, lane l the l-th):
//     w     = widths[class of the base word]                    0 where the lane has no column
//     takes = ballot(lane holds fewer than w bits)              who takes the next units, in the order of lanes
//     unit  = stream[at + lanes below me that take]; at += popc(takes)
//     v     = the lane's next w bits;  word = base + v - 2^(w-1)
//
// The chain from step to step is held -> ballot -> at: no memory. Units come from a window of 128 in
// registers, four a lane, of which two are still on their way: 32 consecutive units a load, each read once.
// Two shuffles pick a unit.
// Registers of a lane: bits 1 (2 for words of 4 and 8 bytes), held 1, window 4 (8 for 8 bytes), position 2, width 1.
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
  static constexpr uint32_t kWindows = 4;

  const W* units_;
  uint32_t count_;
  uint32_t window_;  // the unit that window 0 begins with
  uint32_t at_;      // units used beyond `window_`: less than 32 between steps
  Word ahead_[kWindows];
  Bits bits_;      // the lane's bits, the next one lowest; none above them
  uint32_t held_;  // how many: fewer than a word's
  uint32_t width_of_class_;
  uint32_t shift_;
  uint32_t lane_;

  XORZ_DEVICE Word unit(uint32_t i) const { return i < count_ ? Word(load_once(units_ + i)) : Word(0); }

  // base + v - 2^(w-1), v the lane's next w bits, w > 0; `fresh` is its next unit, if it takes one.
  XORZ_DEVICE W long_word(W base, uint32_t w, bool takes, W fresh) {
    const Bits mask = ~Bits(0) >> (8 * sizeof(Bits) - w), half = Bits(1) << (w - 1);
    const Bits all = takes ? bits_ | static_cast<Bits>(fresh) << held_ : bits_;
    const uint32_t used = takes ? w - held_ : w;
    bits_ = (takes ? static_cast<Bits>(fresh) : bits_) >> (used - 1) >> 1;
    held_ = takes ? kBits - used : held_ - w;
    return static_cast<W>(base + static_cast<W>(all & mask) - static_cast<W>(half));
  }

 public:
  // At the first word of `tile`; false where the directory contradicts itself. The whole warp calls.
  XORZ_DEVICE bool begin(const View& v, uint32_t tile) {
    Span span;
    if (!units_of(v, tile, span)) return false;
    units_ = reinterpret_cast<const W*>(v.bytes + v.payload) + span.from;
    count_ = span.to - span.from;
    lane_ = thread_index() % kStreamLanes;
    window_ = at_ = held_ = 0;
    bits_ = 0;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kWindows; i++) ahead_[i] = unit(i * kStreamLanes + lane_);
    width_of_class_ = load_once(v.widths() + lane_);
    shift_ = mantissa_bits_of(v.dtype, sizeof(W));
    return true;
  }

  // The fine-tuned word of the lane's base word, exceptions apart; `live` where the lane has a column. The
  // whole warp calls. Where the stream has ended, its units are zeros (see `spent`).
  XORZ_DEVICE W step(W base, bool live) {
    const uint32_t of_class =
        warp_shuffle(width_of_class_, static_cast<uint32_t>(base >> shift_) & (kClasses - 1));
    const uint32_t w = live ? of_class : 0;
    const bool takes = held_ < w;
    const uint32_t takers = warp_ballot(takes);
    const uint32_t mine = at_ + bit_count(takers & ((1u << lane_) - 1));
    const Word first = warp_shuffle(ahead_[0], mine % kStreamLanes),
               second = warp_shuffle(ahead_[1], mine % kStreamLanes);
    const Word fresh = mine < kStreamLanes ? first : second;
    at_ += bit_count(takers);
    W value = base;
    if constexpr (sizeof(W) == 8) {
      if (w != 0) value = long_word(base, w, takes, fresh);
    } else {
      // Without a branch: a width of 0 takes no bits and adds nothing.
      if (takes) bits_ |= static_cast<Bits>(fresh) << held_;
      const Bits over = Bits(1) << w;
      value = static_cast<W>(base + static_cast<Word>(bits_ & (over - 1)) - static_cast<Word>(over >> 1));
      bits_ >>= w;
      held_ += (takes ? kBits : 0) - w;
    }
    if (at_ >= kStreamLanes) {
      at_ -= kStreamLanes;
      window_ += kStreamLanes;  // each: refill
      XORZ_UNROLL
      for (uint32_t i = 0; i + 1 < kWindows; i++) ahead_[i] = ahead_[i + 1];         // each: refill
      ahead_[kWindows - 1] = unit(window_ + (kWindows - 1) * kStreamLanes + lane_);  // each: refill
    }
    return value;
  }

  // Whether no more units were used than there are, and, at the tile's end, all of them.
  XORZ_DEVICE bool sound(bool at_end) const {
    const uint64_t used = static_cast<uint64_t>(window_) + at_;
    return at_end ? used == count_ : used <= count_;
  }
};

}  // namespace xorz
