/* Add a change to a tensor and round the sum once, in a single pass over memory; the sums for the rounding loss are accumulated
 * on the way, in double, PIECE elements at a time. The order of operations is that of torch, so that the tensors agree bit for
 * bit. Returns 0, or 2 if a value to be written is not finite. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PIECE 131072 /* elements summed in one double */
#define BLOCK 512    /* elements processed at a time */

enum kind { F32, BF16, F16 };

static float as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint32_t as_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float from_half(uint16_t h)
{
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13, exponent = h & 0x7c00;
    float x = exponent == 0x7c00 ? as_float(bits | 0x7f800000) : as_float(bits) * 0x1p112f;
    return as_float(as_bits(x) | (uint32_t)(h & 0x8000) << 16);
}

/* Round to nearest, ties to even; x is finite */
static uint16_t to_half(float x)
{
    uint32_t sign = as_bits(x) >> 16 & 0x8000, bits = as_bits(x) & 0x7fffffff;
    uint32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t small = as_bits(as_float(bits) + 0.5f) - 0x3f000000;
    return (uint16_t)(sign | (bits >= 0x477ff000 ? 0x7c00 : bits < 0x38800000 ? small : normal));
}

static uint16_t to_bfloat(float x) { return (uint16_t)((as_bits(x) + 0x7fff + (as_bits(x) >> 16 & 1)) >> 16); }

static void decode(const void *data, int kind, long start, long n, float *restrict out)
{
    const uint16_t *restrict x = (const uint16_t *)data + start;
    if (kind == BF16)
#pragma omp simd
        for (long i = 0; i < n; i++)
            out[i] = as_float((uint32_t)x[i] << 16);
    else if (kind == F16)
#pragma omp simd
        for (long i = 0; i < n; i++)
            out[i] = from_half(x[i]);
    else
        memcpy(out, (const float *)data + start, n * sizeof(float));
}

/* Round x in place to the values of a kind */
static void round_to(float *restrict x, int kind, long n)
{
    if (kind == BF16)
#pragma omp simd
        for (long i = 0; i < n; i++)
            x[i] = as_float((uint32_t)to_bfloat(x[i]) << 16);
    else if (kind == F16)
#pragma omp simd
        for (long i = 0; i < n; i++)
            x[i] = from_half(to_half(x[i]));
}

static void encode(const float *restrict x, int kind, long start, long n, void *out)
{
    uint16_t *restrict half = (uint16_t *)out + start;
    if (kind == BF16)
#pragma omp simd
        for (long i = 0; i < n; i++)
            half[i] = (uint16_t)(as_bits(x[i]) >> 16);
    else if (kind == F16)
#pragma omp simd
        for (long i = 0; i < n; i++)
            half[i] = to_half(x[i]);
    else
        memcpy((float *)out + start, x, n * sizeof(float));
}

static int all_finite(const float *x, long n)
{
    int32_t most = 0; /* magnitudes sort like their bit patterns, infinity and NaN last */
#pragma omp simd reduction(max : most)
    for (long i = 0; i < n; i++) {
        int32_t bits = (int32_t)(as_bits(x[i]) & 0x7fffffff);
        most = bits > most ? bits : most;
    }
    return most < 0x7f800000;
}

/* out = round(base + delta) from `start`, a multiple of PIECE, to `stop`.
 * sums: for each piece, the squared length of the rounding error and of delta. counts: elements with delta != 0, and how many of
 * these are written as the base, rounded alone, would be. */
int round_sum(const void *base, int base_kind, const float *delta, void *out, int out_kind, long start, long stop, double *sums,
              int64_t *counts)
{
    for (long piece = start; piece < stop; piece += PIECE, sums += 2) {
        long end = piece + PIECE < stop ? piece + PIECE : stop;
        double error = 0, length = 0;
        int64_t moved = 0, unchanged = 0;
        for (long at = piece; at < end; at += BLOCK) {
            long n = end - at < BLOCK ? end - at : BLOCK;
            float old[BLOCK], new[BLOCK], alone[BLOCK];
            const float *restrict step = delta + at;
            decode(base, base_kind, at, n, old);
            for (long i = 0; i < n; i++)
                new[i] = old[i] + step[i];
            if (!all_finite(new, n))
                return 2;
            round_to(new, out_kind, n);
            if (!all_finite(new, n))
                return 2;
            memcpy(alone, old, sizeof alone);
            if (base_kind != out_kind)
                round_to(alone, out_kind, n);
            int some = 0, same = 0;
#pragma omp simd reduction(+ : error, length, some, same)
            for (long i = 0; i < n; i++) {
                float lost = (new[i] - old[i]) - step[i];
                error += (double)lost * lost;
                length += (double)step[i] * step[i];
                some += step[i] != 0;
                same += (step[i] != 0) & (new[i] == alone[i]);
            }
            moved += some;
            unchanged += same;
            encode(new, out_kind, at, n, out);
        }
        sums[0] = error;
        sums[1] = length;
        counts[0] += moved;
        counts[1] += unchanged;
    }
    return 0;
}
