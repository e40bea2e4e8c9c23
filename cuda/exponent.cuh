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

template <class W>
struct LaneBits {
  using Type = uint32_t;
};
template <>
struct LaneBits<uint32_t> {
  using Type = uint64_t;
};
template <>
struct LaneBits<uint64_t> {
  using Type = uint64_t;
};

template <class W>
class Stream {
  using Bits = typename LaneBits<W>::Type;
  static constexpr uint32_t kBits = 8 * sizeof(W);
  static constexpr uint32_t kWindows = 4;

  const W* units_;
  uint32_t count_;
  uint32_t window_;  // the unit that window 0 begins with
  uint32_t at_;      // units used beyond `window_`: less than 32 between steps
  W ahead_[kWindows];
  Bits bits_;      // the lane's bits, the next one lowest
  uint32_t held_;  // how many: fewer than a word's
  uint32_t width_of_class_;
  uint32_t shift_;
  uint32_t lane_;

  XORZ_DEVICE W unit(uint32_t i) const { return i < count_ ? load_once(units_ + i) : W(0); }

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
    const W first = warp_shuffle(ahead_[0], mine % kStreamLanes),
            second = warp_shuffle(ahead_[1], mine % kStreamLanes);
    const W fresh = mine < kStreamLanes ? first : second;
    at_ += bit_count(takers);
    W value = base;
    if (w != 0) {
      // Words of 8 bytes leave no room above a lane's bits for a unit: what does not fit is taken from the
      // unit itself.
      const Bits mask = ~Bits(0) >> (8 * sizeof(Bits) - w);
      if (takes) {
        const Bits all = bits_ | static_cast<Bits>(fresh) << held_;
        const uint32_t used = w - held_;
        value = static_cast<W>(base + static_cast<W>(all & mask) - static_cast<W>(Bits(1) << (w - 1)));
        bits_ = static_cast<Bits>(fresh) >> (used - 1) >> 1;
        held_ = kBits - used;
      } else {
        value = static_cast<W>(base + static_cast<W>(bits_ & mask) - static_cast<W>(Bits(1) << (w - 1)));
        bits_ = bits_ >> (w - 1) >> 1;
        held_ -= w;
      }
    }
    if (at_ >= kStreamLanes) {
      at_ -= kStreamLanes;
      window_ += kStreamLanes;
      XORZ_UNROLL
      for (uint32_t i = 0; i + 1 < kWindows; i++) ahead_[i] = ahead_[i + 1];
      ahead_[kWindows - 1] = unit(window_ + (kWindows - 1) * kStreamLanes + lane_);
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
