#include "sha256.h"

#include <stdio.h>
#include <string.h>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#else
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

static const uint32_t ROUNDS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

void sha256_begin(uint32_t words[8]) {
    static const uint32_t first[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(words, first, sizeof first);
}

static inline uint32_t turned(uint32_t word, int by) { return word >> by | word << (32 - by); }

__attribute__((always_inline))
static inline void round_of(uint32_t a, uint32_t b, uint32_t c, uint32_t *d, uint32_t e, uint32_t f,
                            uint32_t g, uint32_t *h, uint32_t added) {
    *h += (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + added;
    *d += *h;
    *h += (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
}

static void add_on_any_cpu(uint32_t words[8], const unsigned char *data, size_t blocks) {
    for (; blocks; blocks--, data += SHA256_BLOCK) {
        uint32_t w[64];
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)data[4 * i] << 24 | (uint32_t)data[4 * i + 1] << 16 |
                   (uint32_t)data[4 * i + 2] << 8 | data[4 * i + 3];
        for (int i = 16; i < 64; i++) {
            uint32_t x = w[i - 15], y = w[i - 2];
            w[i] = w[i - 16] + (turned(x, 7) ^ turned(x, 18) ^ x >> 3) + w[i - 7] +
                   (turned(y, 17) ^ turned(y, 19) ^ y >> 10);
        }
        uint32_t a = words[0], b = words[1], c = words[2], d = words[3];
        uint32_t e = words[4], f = words[5], g = words[6], h = words[7];
        for (int i = 0; i < 64; i += 8) {  // instead of moving eight words on by one each time
            round_of(a, b, c, &d, e, f, g, &h, ROUNDS[i] + w[i]);
            round_of(h, a, b, &c, d, e, f, &g, ROUNDS[i + 1] + w[i + 1]);
            round_of(g, h, a, &b, c, d, e, &f, ROUNDS[i + 2] + w[i + 2]);
            round_of(f, g, h, &a, b, c, d, &e, ROUNDS[i + 3] + w[i + 3]);
            round_of(e, f, g, &h, a, b, c, &d, ROUNDS[i + 4] + w[i + 4]);
            round_of(d, e, f, &g, h, a, b, &c, ROUNDS[i + 5] + w[i + 5]);
            round_of(c, d, e, &f, g, h, a, &b, ROUNDS[i + 6] + w[i + 6]);
            round_of(b, c, d, &e, f, g, h, &a, ROUNDS[i + 7] + w[i + 7]);
        }
        const uint32_t now[8] = {a, b, c, d, e, f, g, h};
        for (int i = 0; i < 8; i++) words[i] += now[i];
    }
}

// The same with the instructions that most CPUs have for it: seven times as fast.

#ifdef __x86_64__
static int has_instructions(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1) || !(c & bit_SSSE3)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

__attribute__((target("sha,ssse3,sse4.1")))
static void add_by_instructions(uint32_t words[8], const unsigned char *data, size_t blocks) {
    const __m128i bytes = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abcd = _mm_loadu_si128((__m128i *)words), efgh = _mm_loadu_si128((__m128i *)words + 1);
    abcd = _mm_shuffle_epi32(abcd, 0xB1);
    efgh = _mm_shuffle_epi32(efgh, 0x1B);
    __m128i abef = _mm_alignr_epi8(abcd, efgh, 8), cdgh = _mm_blend_epi16(efgh, abcd, 0xF0);
    for (; blocks; blocks--, data += SHA256_BLOCK) {
        __m128i w[4], abef_before = abef, cdgh_before = cdgh;
        for (int i = 0; i < 4; i++)
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)data + i), bytes);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m128i now = _mm_add_epi32(w[i & 3], _mm_loadu_si128((const __m128i *)ROUNDS + i));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, now);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(now, 0x0E));
            __m128i last = w[(i + 3) & 3], further = _mm_alignr_epi8(last, w[(i + 2) & 3], 4);
            __m128i next = _mm_add_epi32(_mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]), further);
            w[i & 3] = _mm_sha256msg2_epu32(next, last);
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    abef = _mm_shuffle_epi32(abef, 0x1B);
    cdgh = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)words, _mm_blend_epi16(abef, cdgh, 0xF0));
    _mm_storeu_si128((__m128i *)words + 1, _mm_alignr_epi8(cdgh, abef, 8));
}
#else
static int has_instructions(void) { return getauxval(AT_HWCAP) >> 6 & 1; }  // HWCAP_SHA2

__attribute__((target("sha2")))
static void add_by_instructions(uint32_t words[8], const unsigned char *data, size_t blocks) {
    uint32x4_t abcd = vld1q_u32(words), efgh = vld1q_u32(words + 4);
    for (; blocks; blocks--, data += SHA256_BLOCK) {
        uint32x4_t w[4], abcd_before = abcd, efgh_before = efgh;
        for (int i = 0; i < 4; i++) w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            uint32x4_t now = vaddq_u32(w[i & 3], vld1q_u32(ROUNDS + 4 * i)), before = abcd;
            abcd = vsha256hq_u32(abcd, efgh, now);
            efgh = vsha256h2q_u32(efgh, before, now);
            w[i & 3] = vsha256su1q_u32(vsha256su0q_u32(w[i & 3], w[(i + 1) & 3]), w[(i + 2) & 3],
                                       w[(i + 3) & 3]);
        }
        abcd = vaddq_u32(abcd, abcd_before);
        efgh = vaddq_u32(efgh, efgh_before);
    }
    vst1q_u32(words, abcd);
    vst1q_u32(words + 4, efgh);
}
#endif

void sha256_add(uint32_t words[8], const unsigned char *data, size_t blocks) {
    (has_instructions() ? add_by_instructions : add_on_any_cpu)(words, data, blocks);
}

void sha256_end(uint32_t words[8], const unsigned char *data, size_t rest, uint64_t length,
                char hex[SHA256_HEX + 1]) {
    unsigned char last[2 * SHA256_BLOCK] = {0};
    size_t blocks = rest + 9 > SHA256_BLOCK ? 2 : 1;
    memcpy(last, data, rest);
    last[rest] = 0x80;
    for (int i = 0; i < 8; i++) last[blocks * SHA256_BLOCK - 1 - i] = (unsigned char)(length * 8 >> 8 * i);
    sha256_add(words, last, blocks);
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08x", words[i]);
}
