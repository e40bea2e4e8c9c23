// xxh3-128 of bytes in device memory, by one block of threads: the hash of the xxHash specification with its default
// secret and seed 0, bit for bit, of any length at any address.
//
//   up to 240 bytes: each thread puts a byte in shared memory, one thread hashes them
//   more: the hash goes through stripes of 64 bytes, eight words each added to one of eight sums; after 16 of them, a
//     part of 1024 bytes, each sum is scrambled. What a part adds does not depend on the sums. So
//       a warp takes two parts of the 16 of a round: a lane 4 times 16 bytes, two words and their two sums;
//       8 lanes have the same two sums: halves are given away by shuffles, 8 of 32 bits for both parts;
//       64 bytes a part go to shared memory, then a barrier;
//       warp 0 adds and scrambles, part after part, while the others are at the next round
//     the last stripe, which may overlap the one before, and the merge of the sums: warp 0
//
// Order: all of it is arithmetic of 64 bits without carry between words, so sums may be had in any order.
//
// Bytes: each is read once (the last stripe's up to twice), 64 a KiB pass through shared memory. Under way are the next
// two rounds, 32 KiB a block of threads: 16-byte loads where the address allows them, else words as it allows.
//
// Operations, by the machine code for sm_90: a warp issues 239 instructions a round, warp 0 some 219 more for the 16 parts'
// sums. So a round of 16 KiB takes 533 of a multiprocessor's cycles with its four schedulers: 31 bytes a cycle, 54 GB/s at
// 1.755 GHz, 3.4 TB/s of the 64 that hash 4096 rows, 10 us for 32 MiB. The chain of sums cannot be spread: a shift, an
// exclusive or, a product and its upper half, some 20 cycles a KiB, 6 us for the 512 KiB of 64 rows of 4096 words of two
// bytes; the other warps are ahead of it. So a matrix of few leaves is bound by what few multiprocessors issue, and one of
// many by memory. Estimates: no GPU has run it.
//
// Registers: 48 for the rounds under way, 8 of secret; see gate.txt. Shared memory: 2.4 KiB.
#pragma once

#include "word.cuh"

namespace xorz {

constexpr uint32_t kHashThreads = 256;
constexpr uint32_t kFewBytes = 240;  // the most that one thread hashes
constexpr uint32_t kStripeBytes = 64;
constexpr uint32_t kPartBytes = 1024;
constexpr uint32_t kPartStripes = kPartBytes / kStripeBytes;
constexpr uint32_t kRoundParts = 2 * kHashThreads / 32;
constexpr uint32_t kSecretBytes = 192;

constexpr uint32_t kSmallPrime1 = 0x9E3779B1u;
constexpr uint32_t kSmallPrime2 = 0x85EBCA77u;
constexpr uint32_t kSmallPrime3 = 0xC2B2AE3Du;
constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5u;

// The specification's default secret, as little-endian words.
XORZ_CONSTANT uint64_t kSecret[kSecretBytes / 8] = {
    0xBE4BA423396CFEB8u, 0x1CAD21F72C81017Cu, 0xDB979083E96DD4DEu, 0x1F67B3B7A4A44072u, 0x78E5C0CC4EE679CBu,
    0x2172FFCC7DD05A82u, 0x8E2443F7744608B8u, 0x4C263A81E69035E0u, 0xCB00C391BB52283Cu, 0xA32E531B8B65D088u,
    0x4EF90DA297486471u, 0xD8ACDEA946EF1938u, 0x3F349CE33F76FAA8u, 0x1D4F0BC7C7BBDCF9u, 0x3159B4CD4BE0518Au,
    0x647378D9C97E9FC8u, 0xC3EBD33483ACC5EAu, 0xEB6313FAFFA081C5u, 0x49DAF0B751DD0D17u, 0x9E68D429265516D3u,
    0xFCA1477D58BE162Bu, 0xCE31D07AD1B8F88Fu, 0x280416958F3ACB45u, 0x7E404BBBCAFBD7AFu,
};
// What the eight sums begin with.
XORZ_CONSTANT uint64_t kFirstSums[8] = {kSmallPrime3, kPrime1,      kPrime2, kPrime3,
                                        kPrime4,      kSmallPrime2, kPrime5, kSmallPrime1};

struct HashShared {
  uint64_t parts[2][kRoundParts][8];  // what the parts of a round add, of two rounds in turn
  uint64_t sums[8];
  uint64_t digest[2];  // the result: lower half, upper half
  uint8_t few[kFewBytes];
};

// The eight bytes of the secret from `at` on.
XORZ_DEVICE uint64_t secret_at(uint32_t at) {
  const uint32_t bits = at % 8 * 8;
  const uint64_t low = kSecret[at / 8] >> bits;
  return bits == 0 ? low : low | kSecret[at / 8 + 1] << (64 - bits);
}

// Both halves of the product, one over the other.
XORZ_DEVICE uint64_t folded(uint64_t a, uint64_t b) { return (a * b) ^ multiply_high(a, b); }

XORZ_DEVICE uint64_t product_of_halves(uint64_t word) {
  return static_cast<uint64_t>(static_cast<uint32_t>(word)) * static_cast<uint32_t>(word >> 32);
}

XORZ_DEVICE uint64_t avalanche(uint64_t v) {
  v = (v ^ v >> 37) * 0x165667919E3779F9u;
  return v ^ v >> 32;
}

// That of the shortest inputs.
XORZ_DEVICE uint64_t avalanche_of_few(uint64_t v) {
  v = (v ^ v >> 33) * kPrime2;
  v = (v ^ v >> 29) * kPrime3;
  return v ^ v >> 32;
}

XORZ_DEVICE uint32_t bytes_turned(uint32_t v) {
  return v << 24 | (v & 0xFF00) << 8 | (v >> 8 & 0xFF00) | v >> 24;
}

// Up to 240 bytes of shared memory, for one thread.
struct Few {
  const uint8_t* bytes;
  uint32_t length;
  uint64_t digest[2];

  XORZ_DEVICE uint64_t read(uint32_t at, uint32_t count) const {
    uint64_t out = 0;
    for (uint32_t i = 0; i < count; i++) out |= static_cast<uint64_t>(bytes[at + i]) << (8 * i);
    return out;
  }

  XORZ_DEVICE void up_to_3() {
    uint64_t low = 0, high = secret_at(80) ^ secret_at(88);
    if (length == 0) {
      low = secret_at(64) ^ secret_at(72);
    } else {
      const uint32_t both = bytes[length - 1] | length << 8 | static_cast<uint32_t>(bytes[0]) << 16 |
                            static_cast<uint32_t>(bytes[length / 2]) << 24;
      const uint32_t turned = bytes_turned(both);
      low = both ^ static_cast<uint32_t>(secret_at(0) ^ secret_at(4));
      high = (turned << 13 | turned >> 19) ^ static_cast<uint32_t>(secret_at(8) ^ secret_at(12));
    }
    digest[0] = avalanche_of_few(low);
    digest[1] = avalanche_of_few(high);
  }

  XORZ_DEVICE void up_to_8() {
    const uint64_t both = read(0, 4) | read(length - 4, 4) << 32;
    const uint64_t value = both ^ secret_at(16) ^ secret_at(24), by = kPrime1 + (length << 2);
    uint64_t low = value * by;
    const uint64_t high = multiply_high(value, by) + (low << 1);
    low ^= high >> 3;
    low = (low ^ low >> 35) * 0x9FB21C651E98DF25u;
    digest[0] = low ^ low >> 28;
    digest[1] = avalanche(high);
  }

  XORZ_DEVICE void up_to_16() {
    const uint64_t last = read(length - 8, 8), second = last ^ secret_at(48) ^ secret_at(56);
    const uint64_t first = read(0, 8) ^ last ^ secret_at(32) ^ secret_at(40);
    uint64_t low = first * kPrime1 + (static_cast<uint64_t>(length - 1) << 54);
    const uint64_t high = multiply_high(first, kPrime1) + second +
                          static_cast<uint64_t>(static_cast<uint32_t>(second)) * (kSmallPrime2 - 1);
    low ^= static_cast<uint64_t>(bytes_turned(static_cast<uint32_t>(high))) << 32 |
           bytes_turned(static_cast<uint32_t>(high >> 32));
    digest[0] = avalanche(low * kPrime2);
    digest[1] = avalanche(multiply_high(low, kPrime2) + high * kPrime2);
  }

  XORZ_DEVICE uint64_t mixed(uint32_t at, uint32_t secret) const {
    return folded(read(at, 8) ^ secret_at(secret), read(at + 8, 8) ^ secret_at(secret + 8));
  }
  XORZ_DEVICE void mix_two(uint32_t one, uint32_t other, uint32_t secret) {
    digest[0] = (digest[0] + mixed(one, secret)) ^ (read(other, 8) + read(other + 8, 8));
    digest[1] = (digest[1] + mixed(other, secret + 16)) ^ (read(one, 8) + read(one + 8, 8));
  }

  XORZ_DEVICE void up_to_240() {
    digest[0] = length * kPrime1;
    digest[1] = 0;
    if (length <= 128) {
      for (uint32_t i = (length - 1) / 32 + 1; i-- > 0;) mix_two(16 * i, length - 16 * i - 16, 32 * i);
    } else {
      for (uint32_t i = 0; i < 4; i++) mix_two(32 * i, 32 * i + 16, 32 * i);
      digest[0] = avalanche(digest[0]);
      digest[1] = avalanche(digest[1]);
      for (uint32_t i = 4; i < length / 32; i++) mix_two(32 * i, 32 * i + 16, 32 * (i - 4) + 3);
      mix_two(length - 16, length - 32, 103);
    }
    const uint64_t sum = digest[0] + digest[1];
    digest[1] = 0 - avalanche(digest[0] * kPrime1 + digest[1] * kPrime4 + length * kPrime2);
    digest[0] = avalanche(sum);
  }

  XORZ_DEVICE void hash() {
    if (length <= 3)
      up_to_3();
    else if (length <= 8)
      up_to_8();
    else if (length <= 16)
      up_to_16();
    else
      up_to_240();
  }
};

XORZ_DEVICE uint64_t word_of(const Vector& v, uint32_t i) {
  return v.part[2 * i] | static_cast<uint64_t>(v.part[2 * i + 1]) << 32;
}

// Eight bytes, by loads that the address allows.
XORZ_DEVICE uint64_t word_at(const uint8_t* at) {
  if (aligned(at, 8)) return load(reinterpret_cast<const uint64_t*>(at));
  uint64_t out = 0;
  if (aligned(at, 4)) {
    XORZ_UNROLL
    for (uint32_t i = 0; i < 2; i++)
      out |= static_cast<uint64_t>(load(reinterpret_cast<const uint32_t*>(at) + i)) << (32 * i);
  } else if (aligned(at, 2)) {
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++)
      out |= static_cast<uint64_t>(load(reinterpret_cast<const uint16_t*>(at) + i)) << (16 * i);
  } else {
    XORZ_UNROLL
    for (uint32_t i = 0; i < 8; i++) out |= static_cast<uint64_t>(load(at + i)) << (8 * i);
  }
  return out;
}

// How 16 bytes of the input are read, whose address is a multiple of 16, ...
struct InOne {
  XORZ_DEVICE static Vector read(const uint8_t* at) { return load_vector(at); }
};
// ... any, ...
struct InPieces {
  XORZ_DEVICE static Vector read(const uint8_t* at) {
    const uint64_t low = word_at(at), high = word_at(at + 8);
    return {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
             static_cast<uint32_t>(high >> 32)}};
  }
};
// ... or a multiple of 16 and 15 more, where the 15 bytes before it and the one behind may be read, too.
struct AcrossTwo {
  XORZ_DEVICE static Vector read(const uint8_t* at) {
    const Vector one = load_vector(at - 15), other = load_vector(at + 1);
    Vector out;
    uint32_t before = one.part[3];
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++) {
      out.part[i] = before >> 24 | other.part[i] << 8;
      before = other.part[i];
    }
    return out;
  }
};

// What a lane adds to two neighbouring sums.
struct TwoSums {
  uint64_t first = 0, second = 0;

  XORZ_DEVICE void add(const Vector& data, const uint64_t (&secret)[2]) {
    const uint64_t one = word_of(data, 0), other = word_of(data, 1);
    first += other + product_of_halves(one ^ secret[0]);
    second += one + product_of_halves(other ^ secret[1]);
  }
};

// What a warp takes of a round: of its two parts each lane has 16 bytes of 4 stripes, 8 stripes apart.
template <class Read>
struct WarpRound {
  Vector data[4];
  uint32_t stripes;  // how many of the warp's there are

  // Of `bytes`, which have `all` stripes, those from `first` on.
  XORZ_DEVICE void fetch(const uint8_t* bytes, uint64_t first, uint64_t all) {
    const uint32_t lane = thread_index() % 32;
    const uint64_t left = first < all ? all - first : 0;
    stripes = left < 2 * kPartStripes ? static_cast<uint32_t>(left) : 2 * kPartStripes;
    const uint8_t* mine = bytes + first * kStripeBytes + lane * 16;
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++)
      if (lane / 4 + 8 * i < stripes) data[i] = Read::read(mine + 8 * i * kStripeBytes);
  }

  // What the two parts add, to `to`.
  XORZ_DEVICE void sum(uint64_t (*to)[8], const uint64_t (&secret)[2][2]) const {
    const uint32_t lane = thread_index() % 32;
    TwoSums part[2];
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++)
      if (lane / 4 + 8 * i < stripes) part[i / 2].add(data[i], secret[i % 2]);
    const bool upper = (lane & 4) != 0, odd = (lane & 8) != 0;
    TwoSums mine = upper ? part[1] : part[0];
    const TwoSums given = upper ? part[0] : part[1];
    mine.first += warp_shuffle_xor(given.first, 4);
    mine.second += warp_shuffle_xor(given.second, 4);
    uint64_t sum = odd ? mine.second : mine.first;
    sum += warp_shuffle_xor(odd ? mine.first : mine.second, 8);
    sum += warp_shuffle_xor(sum, 16);
    if (lane < 16) to[upper][lane % 4 * 2 + odd] = sum;
  }
};

XORZ_DEVICE uint64_t scrambled(uint64_t sum, uint64_t secret) {
  return (sum ^ sum >> 47 ^ secret) * kSmallPrime1;
}

XORZ_DEVICE uint64_t merged(const uint64_t (&sums)[8], uint32_t secret, uint64_t start) {
  for (uint32_t i = 0; i < 8; i += 2)
    start += folded(sums[i] ^ secret_at(secret + 8 * i), sums[i + 1] ^ secret_at(secret + 8 * i + 8));
  return avalanche(start);
}

// The last stripe and the merge; `sum` is the lane's of its eight. The warp calls.
XORZ_DEVICE void finish(HashShared& shared, const uint8_t* bytes, uint64_t length, uint64_t sum) {
  const uint32_t lane = thread_index() % 32, which = lane % 8;
  const uint64_t word = word_at(bytes + length - kStripeBytes + 8 * which);
  sum += warp_shuffle_xor(word, 1) + product_of_halves(word ^ secret_at(121 + 8 * which));
  if (lane < 8) shared.sums[lane] = sum;
  warp_sync();
  if (lane < 2)
    shared.digest[lane] = merged(shared.sums, lane == 0 ? 11 : kSecretBytes - 64 - 11,
                                 lane == 0 ? length * kPrime1 : ~(length * kPrime2));
}

// More than 240 bytes.
template <class Read>
XORZ_DEVICE void hash_many(HashShared& shared, const uint8_t* bytes, uint64_t length) {
  const uint32_t warp = thread_index() / 32, lane = thread_index() % 32;
  // Stripes but for the last, and parts behind which the sums are scrambled.
  const uint64_t stripes = (length - 1) / kStripeBytes, parts = (length - 1) / kPartBytes;
  uint64_t secret[2][2];
  XORZ_UNROLL
  for (uint32_t i = 0; i < 4; i++)
    secret[i / 2][i % 2] = kSecret[lane / 4 + i / 2 * 8 + lane % 4 * 2 + i % 2];
  const uint64_t scramble = kSecret[kPartStripes + lane % 8];
  uint64_t sum = kFirstSums[lane % 8];
  WarpRound<Read> now, next = {}, later = {};
  const uint64_t rounds = parts / kRoundParts + 1;
  for (uint64_t ahead = 0; ahead < rounds + 2; ahead++) {
    now = next;
    next = later;
    if (ahead < rounds) later.fetch(bytes, (ahead * kRoundParts + 2 * warp) * kPartStripes, stripes);
    if (ahead < 2) continue;
    const uint64_t first = (ahead - 2) * kRoundParts;  // the round's first part
    const uint32_t turn = static_cast<uint32_t>(ahead % 2);
    now.sum(&shared.parts[turn][2 * warp], secret);
    block_sync();
    if (warp != 0) continue;
    // Behind the last part nothing is scrambled.
    const uint32_t whole = parts - first < kRoundParts ? static_cast<uint32_t>(parts - first) : kRoundParts;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kRoundParts; i++) {
      if (i <= whole) sum += shared.parts[turn][i][lane % 8];
      if (i < whole) sum = scrambled(sum, scramble);
    }
  }
  if (warp == 0) finish(shared, bytes, length, sum);
}

// The hash of `length` bytes, to `shared.digest`. The block calls; when it returns the digest is there for all.
template <class Read>
XORZ_DEVICE void hash(HashShared& shared, const uint8_t* bytes, uint64_t length) {
  const uint32_t thread = thread_index();
  if (length > kFewBytes) {
    hash_many<Read>(shared, bytes, length);
  } else {
    if (thread < length) shared.few[thread] = load(bytes + thread);
    block_sync();
    if (thread == 0) {
      Few few = {shared.few, static_cast<uint32_t>(length), {}};
      few.hash();
      shared.digest[0] = few.digest[0];
      shared.digest[1] = few.digest[1];
    }
  }
  block_sync();
}

}  // namespace xorz
