/* Merge methods that treat every element alike, on float32 task vectors: each weight of the base and the runs is read once, and
 * what the diagnostics want to know is summed up on the way. The formulas are those of methods/, in the same order of operations,
 * so that every bit agrees; sums are double. One call works on elements start ... stop - 1 of one tensor; a call for all elements
 * and several calls for parts of them that begin at multiples of PIECE give the same. What is returned is 0, 1 where memory ran
 * out, or 2 + t where a value of run t is not finite. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PIECE 131072 /* elements whose sums go on in one double */
#define BLOCK 512    /* elements worked on at a time: all of it stays in the first cache */

enum kind { F32, BF16, DELTA, STILL }; /* weights; task vectors in float32; a run that does not move */
enum method { LINEAR, TALL_MASK, TIES };


static void decode(const void *data, int kind, long start, long n, float *restrict out)
{
    if (kind == BF16) {
        const uint16_t *restrict x = (const uint16_t *)data + start;
#pragma omp simd
        for (long i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)x[i] << 16;
            memcpy(out + i, &bits, 4);
        }
    } else
        memcpy(out, (const float *)data + start, n * sizeof(float));
}

/* tau = theta - theta_0; returns whether it is finite */
static int task_vector(const void *data, int kind, const float *restrict base, long start, long n, float *restrict tau)
{
    if (kind == STILL) {
        memset(tau, 0, n * sizeof(float));
        return 1;
    }
    decode(data, kind, start, n, tau);
    int bad = 0;
    if (kind == DELTA) {
#pragma omp simd reduction(| : bad)
        for (long i = 0; i < n; i++)
            bad |= !(fabsf(tau[i]) <= 3.4028234663852886e38f);
    } else {
#pragma omp simd reduction(| : bad)
        for (long i = 0; i < n; i++) {
            tau[i] -= base[i];
            bad |= !(fabsf(tau[i]) <= 3.4028234663852886e38f);
        }
    }
    return !bad;
}

/* sum_t w_t tau_t, one run after the other */
static void weighted_sum(int runs, long n, const float (*tau)[BLOCK], const float *weights, float *restrict sum)
{
    for (long i = 0; i < n; i++)
        sum[i] = weights[0] * tau[0][i];
    for (int t = 1; t < runs; t++)
#pragma omp simd
        for (long i = 0; i < n; i++)
            sum[i] += weights[t] * tau[t][i];
}

/* keep * R where at least k masks |tau_t| > lambda_t |R - tau_t| agree */
static void tall_mask(int runs, long n, const float (*tau)[BLOCK], const float *lambda, int k, float *restrict r, int64_t *masked)
{
    int votes[BLOCK] = {0};
    for (int t = 0; t < runs; t++) {
        int count = 0;
#pragma omp simd reduction(+ : count)
        for (long i = 0; i < n; i++) {
            int in = fabsf(tau[t][i]) > lambda[t] * fabsf(r[i] - tau[t][i]);
            votes[i] += in;
            count += in;
        }
        masked[t] += count;
    }
#pragma omp simd
    for (long i = 0; i < n; i++)
        r[i] = votes[i] >= k ? r[i] : 0;
}

/* The task vectors' largest elements: above the threshold, or equal to it and up to the last place. */
static void trim(int runs, long start, long n, float (*tau)[BLOCK], const float *threshold, const int64_t *last, int64_t *kept)
{
    for (int t = 0; t < runs; t++) {
        int count = 0;
        int64_t equal = last[t] < start ? 0 : last[t] - start < n ? last[t] - start + 1 : n;
#pragma omp simd reduction(+ : count)
        for (long i = 0; i < n; i++) {
            float size = fabsf(tau[t][i]);
            int in = size > threshold[t] || (size == threshold[t] && i < equal);
            tau[t][i] = in ? tau[t][i] : 0;
            count += tau[t][i] != 0;
        }
        kept[t] += count;
    }
}

enum elect { SUM, WEIGHTED, COUNT };
enum aggregate { MEAN, NUMBER, ADD, MAX };

static float sign(float x) { return (float)((x > 0) - (x < 0)); }

static float ballot(int elect, float weight, float tau) { return elect == SUM ? tau : elect == WEIGHTED ? weight * tau : sign(tau); }

static void balance_of(int runs, long n, const float (*tau)[BLOCK], const float *weights, int elect, float *restrict balance)
{
    memset(balance, 0, n * sizeof(float));
    for (int t = 0; t < runs; t++)
#pragma omp simd
        for (long i = 0; i < n; i++)
            balance[i] = t ? balance[i] + ballot(elect, weights[t], tau[t][i]) : ballot(elect, weights[t], tau[t][i]);
}

/* Join the elements whose sign is the elected one, `majority` where the election is a draw. */
static void consensus(int runs, long n, const float (*tau)[BLOCK], const float *weights, int elect, int aggregate, int majority,
                      float *restrict merged)
{
    float balance[BLOCK], share[BLOCK];
    balance_of(runs, n, tau, weights, elect, balance);
    memset(merged, 0, n * sizeof(float));
    memset(share, 0, n * sizeof(float));
    for (int t = 0; t < runs; t++)
#pragma omp simd
        for (long i = 0; i < n; i++) {
            float vote = ballot(elect, weights[t], tau[t][i]);
            int positive = majority > 0 ? balance[i] >= 0 : balance[i] > 0;
            int agrees = positive ? vote > 0 : vote < 0;
            float term = agrees ? weights[t] * tau[t][i] : 0;
            if (aggregate == MAX)
                merged[i] = fabsf(term) > fabsf(merged[i]) ? term : merged[i];
            else
                merged[i] += term;
            share[i] += agrees ? (aggregate == MEAN ? weights[t] : 1) : 0;
        }
    if (aggregate == MEAN || aggregate == NUMBER)
#pragma omp simd
        for (long i = 0; i < n; i++)
            merged[i] /= share[i] == 0 ? 1 : share[i];
}

/* What diagnostics.py sums up: products of the pairs (t, u), t <= u, of the runs, and of merged and mean. */
static void figures(int runs, long n, const float (*tau)[BLOCK], const float *merged, double *products, int64_t *signs,
                    int64_t *shared, int64_t *moved, int64_t *kept)
{
    double wide[64][BLOCK];
    float direction[64][BLOCK], any[BLOCK] = {0}, mean[BLOCK];
    for (int t = 0; t < runs; t++)
#pragma omp simd
        for (long i = 0; i < n; i++) {
            wide[t][i] = tau[t][i];
            direction[t][i] = sign(tau[t][i]);
            any[i] += direction[t][i] * direction[t][i];
            mean[i] = t ? mean[i] + tau[t][i] : tau[0][i];
        }
    for (int t = 0; t < runs; t++)
        for (int u = t; u < runs; u++) {
            double product = 0;
            float alike = 0, both = 0;
#pragma omp simd reduction(+ : product, alike, both)
            for (long i = 0; i < n; i++) {
                float pair = direction[t][i] * direction[u][i];
                product += wide[t][i] * wide[u][i];
                alike += pair;
                both += pair * pair;
            }
            *products++ += product;
            signs[t * runs + u] += (int64_t)alike;
            shared[t * runs + u] += (int64_t)both;
            signs[u * runs + t] = signs[t * runs + u];
            shared[u * runs + t] = shared[t * runs + u];
        }
    double mm = 0, mt = 0, tt = 0, kk = 0;
    long count = 0, moves = 0;
#pragma omp simd reduction(+ : mm, mt, tt, kk, count, moves)
    for (long i = 0; i < n; i++) {
        double m = merged[i], a = mean[i] / runs;
        mm += m * m;
        mt += m * (double)(float)a;
        tt += (double)(float)a * (double)(float)a;
        kk += merged[i] != 0 ? (double)(float)a * (double)(float)a : 0;
        count += merged[i] != 0;
        moves += any[i] > 0;
    }
    products[0] += mm, products[1] += mt, products[2] += tt, products[3] += kk;
    *moved += moves;
    *kept += count;
}

/* Merge a part of a tensor.
 *
 * weights, numbers: one for each run: lambda of TALL_MASK, thresholds of TIES. last: places, of TIES.
 * options: LINEAR {divide}; TALL_MASK {votes, divide}; TIES {elect, aggregate, majority}.
 * merged: where the whole tensor's tau_m goes; NULL: only the balance of the elected signs (TIES) goes to counts[0].
 * products: (pieces, runs (runs + 1) / 2 + 4). counts: masked (runs), signs, shared (runs, runs), moved, kept. */
int merge(int method, long start, long stop, int runs, const void *base, int base_kind, const void *const *theta, const int *kinds,
          const float *weights, const float *numbers, const int64_t *last, const int *options, float *merged, double *products,
          int64_t *counts)
{
    float(*tau)[BLOCK] = malloc(runs * sizeof *tau), (*whole)[BLOCK] = malloc(runs * sizeof *whole);
    float origin[BLOCK], nothing[BLOCK];
    int64_t *signs = counts + runs, *shared = signs + runs * runs, *moved = shared + runs * runs, *kept = moved + 1;
    int status = tau && whole && runs <= 64 ? 0 : 1;
    for (long at = start; at < stop && !status; at += BLOCK) {
        long n = stop - at < BLOCK ? stop - at : BLOCK;
        float *out = merged ? merged + at : nothing;
        decode(base, base_kind, at, n, origin);
        for (int t = 0; t < runs && !status; t++)
            if (!task_vector(theta[t], kinds[t], origin, at, n, tau[t]))
                status = 2 + t;
        if (status)
            break;
        if (method == TIES) {
            memcpy(whole, tau, runs * sizeof *tau);
            trim(runs, at, n, tau, numbers, last, counts);
            if (!merged) {
                balance_of(runs, n, tau, weights, options[0], nothing);
                for (long i = 0; i < n; i++)
                    moved[0] += (nothing[i] > 0) - (nothing[i] < 0);
                continue;
            }
            consensus(runs, n, tau, weights, options[0], options[1], options[2], out);
        } else {
            weighted_sum(runs, n, tau, weights, out);
            if (options[method == TALL_MASK])
#pragma omp simd
                for (long i = 0; i < n; i++)
                    out[i] /= runs;
            if (method == TALL_MASK)
                tall_mask(runs, n, tau, numbers, options[0], out, counts);
        }
        double *sums = products + (at - start) / PIECE * (runs * (runs + 1) / 2 + 4);
        figures(runs, n, method == TIES ? whole : tau, out, sums, signs, shared, moved, kept);
    }
    free(tau);
    free(whole);
    return status;
}

/* Count the 16 bits above `shift` of the magnitudes of one run, of those whose higher bits are `prefix` (if it is not negative). */
int count_digits(long start, long stop, const void *base, int base_kind, const void *theta, int kind, int shift, int64_t prefix,
                 int64_t *counts)
{
    float origin[BLOCK], tau[BLOCK];
    uint32_t *local = calloc(4 * 65536, sizeof *local); /* four tables: equal neighbours do not wait for each other */
    int status = local ? 0 : 1;
    for (long at = start; at < stop && !status; at += BLOCK) {
        long n = stop - at < BLOCK ? stop - at : BLOCK;
        uint32_t bits[BLOCK];
        decode(base, base_kind, at, n, origin);
        if (!task_vector(theta, kind, origin, at, n, tau))
            status = 2;
        memcpy(bits, tau, n * sizeof *bits);
        if (prefix < 0)
            for (long i = 0; i < n; i++)
                local[(i & 3) << 16 | ((bits[i] & 0x7fffffff) >> shift & 0xffff)]++;
        else
            for (long i = 0; i < n; i++)
                if ((int64_t)((bits[i] & 0x7fffffff) >> 16) == prefix)
                    local[bits[i] & 0xffff]++;
    }
    for (long i = 0; i < 65536 && local; i++)
        counts[i] += (int64_t)local[i] + local[65536 + i] + local[131072 + i] + local[196608 + i];
    free(local);
    return status;
}

/* The place of the n-th element (from 1) of one run whose magnitude is exactly `value`; -1 if there are fewer. */
int64_t place_of_equal(long size, const void *base, int base_kind, const void *theta, int kind, float value, int64_t nth)
{
    float origin[BLOCK], tau[BLOCK];
    for (long at = 0; at < size; at += BLOCK) {
        long n = size - at < BLOCK ? size - at : BLOCK;
        decode(base, base_kind, at, n, origin);
        task_vector(theta, kind, origin, at, n, tau);
        for (long i = 0; i < n; i++)
            if (fabsf(tau[i]) == value && --nth == 0)
                return at + i;
    }
    return -1;
}
