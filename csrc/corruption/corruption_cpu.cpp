#include "common/parallel.h"
#include "common/philox_simd.h"
#include "common/simd.h"
#include "corruption/corruption.h"

namespace metro::METRO_CPU_NS {
namespace {

// Below this many tokens a second thread costs more than it saves.
constexpr int64_t kGrainTokens = 8192;
constexpr int64_t kGrainSlots = 4096;

// Word 0 of the calls begin, begin + 1, ..., end - 1.
void draw_order(uint64_t seed, int64_t begin, int64_t end, uint32_t* order) {
  const vu purpose = set_u(counter_word(Purpose::kMask, 0));
  for (int64_t first = begin; first < end; first += kLanes) {
    const uint32_t low = static_cast<uint32_t>(first);
    const vu c0 = iota() + low;
    const vu carry = (vu)(c0 < set_u(low));  // all ones where the lower word ran over
    const vu c1 = static_cast<uint32_t>(static_cast<uint64_t>(first) >> 32) - carry;
    const vu word = philox(seed, c0, c1, purpose, vu{}).word[0];
    const int64_t left = end - first;
    memcpy(order + first, &word, sizeof(uint32_t) * (left < kLanes ? left : kLanes));
  }
}

void find_maskable(const MaskTokensParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) p.maskable[t] = 1;
  for (int64_t k = 0; k < p.special_count; ++k) {
    const int64_t special = p.special[k];
    for (int64_t t = begin; t < end; ++t) p.maskable[t] &= p.tokens[t] != special;
  }
}

// Selected are the maskable tokens of an order below `pivot`, and the first `ties` equal to it.
struct Cut {
  uint32_t pivot;
  int64_t ties;
};

// Radix selection of the count-th smallest order, eight bits a pass.
Cut find_cut(const MaskTokensParams& p) {
  int64_t maskable = 0;
  for (int64_t t = 0; t < p.length; ++t) maskable += p.maskable[t];
  if (maskable <= p.count) return {UINT32_MAX, p.length};
  uint64_t prefix = 0;
  int64_t left = p.count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t t = 0; t < p.length; ++t) {
      const uint64_t order = p.order[t];
      const bool candidate = p.maskable[t] && order >> (shift + 8) == prefix;
      histogram[(order >> shift) & 255] += candidate;
    }
    uint64_t digit = 0;
    while (left > histogram[digit]) left -= histogram[digit++];
    prefix = prefix << 8 | digit;
  }
  return {static_cast<uint32_t>(prefix), left};
}

void select_positions(const MaskTokensParams& p) {
  const Cut cut = find_cut(p);
  int64_t ties = cut.ties;
  int64_t slot = 0;
  for (int64_t t = 0; t < p.length && slot < p.count; ++t) {
    const bool tie = p.maskable[t] && p.order[t] == cut.pivot && ties > 0;
    const bool selected = tie || (p.maskable[t] && p.order[t] < cut.pivot);
    p.position[slot] = t;
    p.target[slot] = p.tokens[t];
    slot += selected;
    ties -= tie;
  }
  for (; slot < p.count; ++slot) {
    p.position[slot] = 0;
    p.target[slot] = kIgnoredTarget;
  }
}

// The n-th id that is not special.
int64_t ordinary_id(const MaskTokensParams& p, int64_t n) {
  for (int64_t k = 0; k < p.special_count && p.special[k] <= n; ++k) ++n;
  return n;
}

int64_t replacement(const MaskTokensParams& p, uint64_t seed, int64_t t) {
  const uint64_t index = static_cast<uint64_t>(t);
  const Philox4 drawn =
      philox(seed, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
             counter_word(Purpose::kMask, 0), 0);
  if (drawn.word[1] < p.mask_threshold) return p.mask_id;
  if (drawn.word[1] >= p.random_threshold) return p.tokens[t];
  const uint64_t scaled = static_cast<uint64_t>(drawn.word[2]) * static_cast<uint64_t>(p.ordinary);
  return ordinary_id(p, static_cast<int64_t>(scaled >> 32));
}

}  // namespace

void mask_tokens(const MaskTokensParams& p) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  parallel_for(0, p.length, kGrainTokens, [&](int64_t begin, int64_t end) {
    draw_order(seed, begin, end, p.order);
    find_maskable(p, begin, end);
    memcpy(p.masked + begin, p.tokens + begin, sizeof(int64_t) * (end - begin));
  });
  select_positions(p);
  parallel_for(0, p.count, kGrainSlots, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      if (p.target[slot] == kIgnoredTarget) continue;
      p.masked[p.position[slot]] = replacement(p, seed, p.position[slot]);
    }
  });
}

void replace_tokens(const ReplaceTokensParams& p) {
  parallel_for(0, p.length, kGrainTokens, [&](int64_t begin, int64_t end) {
    memcpy(p.corrupted + begin, p.tokens + begin, sizeof(int64_t) * (end - begin));
    for (int64_t t = begin; t < end; ++t) p.label[t] = p.tokens[t] == p.pad_id ? 255 : 0;
  });
  for (int64_t slot = 0; slot < p.count; ++slot) {
    if (p.target[slot] == kIgnoredTarget) continue;
    const int64_t t = p.position[slot];
    p.corrupted[t] = p.sample[slot];
    if (p.tokens[t] != p.pad_id) p.label[t] = p.sample[slot] != p.tokens[t];
  }
}

}  // namespace metro::METRO_CPU_NS
