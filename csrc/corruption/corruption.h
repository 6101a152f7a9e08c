// What the auxiliary model reads (some tokens masked) and what the main model reads (its samples
// put in their place).
//
// mask_tokens. Token t draws one Philox call {t, Purpose::kMask}. The `count` maskable tokens with
// the smallest (word 0, t) are selected: every subset of that size is equally likely, up to ties of
// probability 2^-32. Word 1 decides what a selected token becomes:
//   word 1 < mask_threshold: mask_id
//   word 1 < random_threshold: an ordinary id, uniform by word 2 · ordinary / 2^32
//   otherwise: itself
// (a kind's share and an id's share are off by at most 2^-32). Nothing but tokens and seed matters.
//
// replace_tokens. corrupted = tokens with sample[n] at position[n]; label 255 where the token is
// pad_id, 1 where a sample differs from the token it replaces, 0 elsewhere. Positions are distinct.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace metro {

constexpr int64_t kIgnoredTarget = -100;  // torch.nn.functional.cross_entropy's ignore_index

struct MaskTokensParams {
  const int64_t* tokens;   // [length]
  const int64_t* special;  // [special_count] ascending, distinct: never selected, never drawn
  const int64_t* seed;     // [1], on the device of the tokens
  int64_t* masked;         // [length]
  int64_t* position;       // [count] ascending; 0 in the slots left over
  int64_t* target;         // [count]; kIgnoredTarget in the slots left over
  uint32_t* order;         // [length] scratch: word 0
  uint8_t* maskable;       // [length] scratch
  int64_t length;
  int64_t special_count;
  int64_t count;
  int64_t mask_id;
  int64_t ordinary;           // ids in [0, vocabulary size) that are not special; below 2^32
  uint64_t mask_threshold;    // in units of 2^-32
  uint64_t random_threshold;  // mask and random together, in units of 2^-32
};

struct ReplaceTokensParams {
  const int64_t* tokens;    // [length]
  const int64_t* position;  // [count]
  const int64_t* target;    // [count]; kIgnoredTarget: slot skipped
  const int64_t* sample;    // [count]
  int64_t* corrupted;       // [length]
  uint8_t* label;           // [length]
  int64_t length;
  int64_t count;
  int64_t pad_id;
};

METRO_CPU_KERNEL(mask_tokens, MaskTokensParams)
METRO_CPU_KERNEL(replace_tokens, ReplaceTokensParams)

// `stream` is a cudaStream_t; the result is a cudaError_t. No rows are allowed.
int mask_tokens_cuda(const MaskTokensParams& p, void* stream);
int replace_tokens_cuda(const ReplaceTokensParams& p, void* stream);

}  // namespace metro
