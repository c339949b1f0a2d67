/* What several kernels share: 16-bit floats, blocks of elements, and changes that are stored as products of two factors. */

#ifndef EMOMERGE_NATIVE_H
#define EMOMERGE_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define PIECE 131072 /* elements summed in one double, the smallest part for a thread */
#define BLOCK 512    /* elements processed at a time: the working set fits into the L1 cache */

enum kind { F32, BF16, F16, DELTA, STILL, FACTORS }; /* weights; task vectors: in float32, zero, or as a product */

static inline float as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t as_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float from_half(uint16_t h)
{
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13, exponent = h & 0x7c00;
    float x = exponent == 0x7c00 ? as_float(bits | 0x7f800000) : as_float(bits) * 0x1p112f;
    return as_float(as_bits(x) | (uint32_t)(h & 0x8000) << 16);
}

/* Round to nearest, ties to even. Infinity is preserved; NaN does not occur. */
static inline uint16_t to_half(float x)
{
    uint32_t sign = as_bits(x) >> 16 & 0x8000, bits = as_bits(x) & 0x7fffffff;
    uint32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t small = as_bits(as_float(bits) + 0.5f) - 0x3f000000;
    return (uint16_t)(sign | (bits >= 0x477ff000 ? 0x7c00 : bits < 0x38800000 ? small : normal));
}

static inline uint16_t to_bfloat(float x) { return (uint16_t)((as_bits(x) + 0x7fff + (as_bits(x) >> 16 & 1)) >> 16); }

static inline float element(const void *data, int kind, long at)
{
    const uint16_t *half = data;
    return kind == BF16 ? as_float((uint32_t)half[at] << 16) : kind == F16 ? from_half(half[at]) : ((const float *)data)[at];
}

static inline void widen_halves(const uint16_t *restrict x, long n, float *restrict out)
{
    long whole = 0;
#ifdef __AVX512F__
    whole = n / 16 * 16;
    for (long i = 0; i < whole; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(x + i))));
#endif
#pragma omp simd
    for (long i = whole; i < n; i++)
        out[i] = from_half(x[i]);
}

static inline void narrow_to_halves(const float *restrict x, long n, uint16_t *restrict out)
{
    long whole = 0;
#ifdef __AVX512F__
    whole = n / 16 * 16;
    for (long i = 0; i < whole; i += 16)
        _mm256_storeu_si256((void *)(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
#pragma omp simd
    for (long i = whole; i < n; i++)
        out[i] = to_half(x[i]);
}

/* Load n elements from `start` on, padded with zeros to a whole block */
static inline void decode(const void *data, int kind, long start, long n, float *restrict out)
{
    const uint16_t *restrict x = (const uint16_t *)data + start;
    if (kind == BF16)
#pragma omp simd
        for (long i = 0; i < n; i++)
            out[i] = as_float((uint32_t)x[i] << 16);
    else if (kind == F16)
        widen_halves(x, n, out);
    else
        memcpy(out, (const float *)data + start, n * sizeof(float));
    memset(out + n, 0, (BLOCK - n) * sizeof(float));
}

/* Round a block to the output dtype; `near` receives the rounded values as float. */
static inline void round_block(int kind, const float *restrict x, float *restrict near, void *restrict out)
{
    uint16_t *restrict half = out;
    if (kind == BF16)
#pragma omp simd
        for (long i = 0; i < BLOCK; i++) {
            half[i] = to_bfloat(x[i]);
            near[i] = as_float((uint32_t)half[i] << 16);
        }
    else if (kind == F16) {
        narrow_to_halves(x, BLOCK, half);
        widen_halves(half, BLOCK, near);
    } else {
        memcpy(out, x, BLOCK * sizeof(float));
        memcpy(near, x, BLOCK * sizeof(float));
    }
}

static inline int all_finite(const float *x)
{
    int32_t most = 0; /* magnitudes sort like their bit patterns, infinity and NaN last */
#pragma omp simd reduction(max : most)
    for (long i = 0; i < BLOCK; i++) {
        int32_t bits = (int32_t)(as_bits(x[i]) & 0x7fffffff);
        most = bits > most ? bits : most;
    }
    return most < 0x7f800000;
}

/* strength * (scale * BA) in `rows` rows of a matrix from the row `start` on. A is (rank, columns), B (rows, rank). The product is
 * Σ_k b_k a_k from k = 0 on, each term rounded before it is added, on every machine: torch's operations give the same bits. */
struct term {
    const float *a, *b;
    long start, rows, rank;
    float scale, strength;
};

/* A sum of terms, in their order */
struct factors {
    const struct term *terms;
    long count, columns;
};

typedef float wide __attribute__((vector_size(64), aligned(4), may_alias));
#define ROWS 4 /* rows computed together, so that A is read from the cache once for all of them */

/* A tile of the product: `rows` rows of `vectors` times 16 columns, which the compiler keeps in registers */
static inline __attribute__((always_inline)) void add_tile(int rows, int vectors, const struct term *term, const float *b,
                                                           const float *a, long columns, float *restrict out, long stride)
{
    wide sum[ROWS][8] = {{{0}}};
    for (long k = 0; k < term->rank; k++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sum[r][v] += b[r * term->rank + k] * *(const wide *)(a + k * columns + 16 * v);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            *(wide *)(out + r * stride + 16 * v) += sum[r][v] * term->scale * term->strength;
}

/* `width` columns of `rows` rows */
static inline __attribute__((always_inline)) void add_rows(int rows, int vectors, const struct term *term, const float *b,
                                                           const float *a, long columns, long width, float *restrict out,
                                                           long stride)
{
    long i = 0;
    for (; i + 16 * vectors <= width; i += 16 * vectors)
        add_tile(rows, vectors, term, b, a + i, columns, out + i, stride);
    for (; i + 16 <= width; i += 16)
        add_tile(rows, 1, term, b, a + i, columns, out + i, stride);
    for (; i < width; i++)
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (long k = 0; k < term->rank; k++)
                sum += b[r * term->rank + k] * a[k * columns + i];
            out[r * stride + i] += sum * term->scale * term->strength;
        }
}

/* Some columns of some rows of the matrix; `stride` elements lie between two rows of `out`. */
static void multiply_rows(const struct factors *factors, long row, long rows, long column, long width, float *restrict out,
                          long stride)
{
    for (long r = 0; r < rows; r++)
        memset(out + r * stride, 0, width * sizeof(float));
    for (long t = 0; t < factors->count; t++) {
        const struct term *term = factors->terms + t;
        long at = row > term->start ? row : term->start, end = term->start + term->rows;
        end = end < row + rows ? end : row + rows;
        for (long done; at < end; at += done) {
            const float *b = term->b + (at - term->start) * term->rank, *a = term->a + column;
            float *to = out + (at - row) * stride;
            done = end - at >= ROWS ? ROWS : end - at >= 2 ? 2 : 1;
            if (done == ROWS)
                add_rows(ROWS, 2, term, b, a, factors->columns, width, to, stride);
            else if (done == 2)
                add_rows(2, 4, term, b, a, factors->columns, width, to, stride);
            else
                add_rows(1, 8, term, b, a, factors->columns, width, to, stride);
        }
    }
}

/* n elements from `at` on of the flat matrix */
static void multiply_out(const struct factors *factors, long at, long n, float *restrict out)
{
    long columns = factors->columns, end = at + n, first = (at + columns - 1) / columns, last = end / columns;
    if (first > last) /* within a row */
        multiply_rows(factors, last, 1, at % columns, n, out, n);
    else {
        if (at % columns)
            multiply_rows(factors, first - 1, 1, at % columns, first * columns - at, out, n);
        if (first < last)
            multiply_rows(factors, first, last - first, 0, columns, out + first * columns - at, columns);
        if (end % columns)
            multiply_rows(factors, last, 1, 0, end % columns, out + last * columns - at, n);
    }
}

/* Products are computed in panels: some whole rows; or, where the rows are so long that A does not stay in the cache, BLOCK
 * columns of ROWS rows, and the same columns of all other rows before the next columns. */
#define LONG 4096   /* elements of a long row */
#define PANEL 8192  /* elements of whole rows, about */

static inline long panel_rows(long columns)
{
    long rows = PANEL / columns / ROWS * ROWS;
    return rows > ROWS ? rows : ROWS;
}

/* Elements of the largest panel */
static inline long panel_room(long columns) { return columns > LONG ? ROWS * BLOCK : (panel_rows(columns) + 1) * columns; }

/* What to do with n elements from `at` on, whose products lie in the panels from `offset` on; returns 0 to go on. */
typedef int (*visitor)(void *context, long at, long n, long offset);

/* Visit the elements begin ... end - 1 once, in blocks. panels: room for one panel for each of `count` factors, some of which may
 * be NULL; all have the same columns. */
static inline int visit_products(const struct factors *const *factors, int count, long columns, long begin, long end,
                                 float *panels, visitor visit, void *context)
{
    long room = panel_room(columns), status = 0;
    if (columns <= LONG) {
        for (long from = begin, to; from < end && !status; from = to) {
            to = ((from + columns - 1) / columns + panel_rows(columns)) * columns;
            to = to < end ? to : end;
            for (int t = 0; t < count; t++)
                if (factors[t])
                    multiply_out(factors[t], from, to - from, panels + t * room);
            for (long at = from; at < to && !status; at += BLOCK)
                status = visit(context, at, to - at < BLOCK ? to - at : BLOCK, at - from);
        }
        return status;
    }
    for (long column = 0; column < columns && !status; column += BLOCK)
        for (long row = begin / columns; row * columns + column < end && !status; row += ROWS) {
            long width = columns - column < BLOCK ? columns - column : BLOCK, rows = (end - 1) / columns + 1 - row;
            rows = rows < ROWS ? rows : ROWS;
            for (int t = 0; t < count; t++)
                if (factors[t])
                    multiply_rows(factors[t], row, rows, column, width, panels + t * room, BLOCK);
            for (long r = 0; r < rows && !status; r++) {
                long whole = (row + r) * columns + column, from = whole > begin ? whole : begin;
                long to = whole + width < end ? whole + width : end;
                if (from < to)
                    status = visit(context, from, to - from, r * BLOCK + from - whole);
            }
        }
    return status;
}

#endif
