/* Elementwise merge methods on float32 task vectors. Each weight of the base and of the runs is read from memory once; the sums
 * for the diagnostics and for the rounding loss are accumulated in the same pass. The formulas and the order of operations are
 * those of methods/, so that results agree bit for bit. Sums are accumulated in double, PIECE elements at a time. Blocks are
 * padded with zeros, which do not affect sums or counts. The functions return 0; 1 if out of memory; 2 if a value to be written
 * is not finite; or 3 + t if a value of run t is not finite. */

#include "../native.h"

#define MOST_RUNS 64

enum method { LINEAR, TALL_MASK, TIES, BALANCE };

/* One tensor and how to merge it.
 *
 * weights: one per run. numbers: one per run, lambda for TALL_MASK, thresholds for TIES. last: index of the last element equal to
 * the threshold that is kept. theta: weights, or a task vector in float32 or as `struct factors`. options: LINEAR {divide}; TALL_MASK {votes, divide}; TIES {elect, aggregate, majority}; BALANCE
 * {elect}. merged: receives tau_m of the whole tensor. out: receives theta_0 + scale tau_m, rounded to out_kind. Either of these
 * two may be NULL. */
struct job {
    int method, runs, base_kind, out_kind;
    const void *base;
    const void *const *theta;
    const int *kinds;
    const float *weights, *numbers;
    const int64_t *last;
    float *merged;
    void *out;
    float scale;
    int options[3];
};

/* tau = theta - theta_0 */
static void task_vector(const void *data, int kind, const float *restrict base, long start, long n, float *restrict tau)
{
    if (kind == FACTORS) {
        multiply_out(data, start, n, tau);
        memset(tau + n, 0, (BLOCK - n) * sizeof(float));
        return;
    }
    if (kind == STILL) {
        memset(tau, 0, BLOCK * sizeof(float));
        return;
    }
    decode(data, kind == DELTA ? F32 : kind, start, n, tau);
    if (kind != DELTA)
#pragma omp simd
        for (long i = 0; i < BLOCK; i++)
            tau[i] -= base[i];
}

/* sum_t w_t tau_t, in the order of the runs */
static void weighted_sum(int runs, const float (*tau)[BLOCK], const float *weights, float *restrict sum)
{
    for (long i = 0; i < BLOCK; i++)
        sum[i] = weights[0] * tau[0][i];
    for (int t = 1; t < runs; t++)
#pragma omp simd
        for (long i = 0; i < BLOCK; i++)
            sum[i] += weights[t] * tau[t][i];
}

/* keep * R where at least k masks |tau_t| > lambda_t |R - tau_t| agree */
static void tall_mask(int runs, const float (*tau)[BLOCK], const float *lambda, int k, float *restrict r, int64_t *masked)
{
    int votes[BLOCK] = {0};
    for (int t = 0; t < runs; t++) {
        int count = 0;
#pragma omp simd reduction(+ : count)
        for (long i = 0; i < BLOCK; i++) {
            int in = fabsf(tau[t][i]) > lambda[t] * fabsf(r[i] - tau[t][i]);
            votes[i] += in;
            count += in;
        }
        masked[t] += count;
    }
#pragma omp simd
    for (long i = 0; i < BLOCK; i++)
        r[i] = votes[i] >= k ? r[i] : 0;
}

/* The largest elements of the task vectors: above the threshold, or equal to it up to the index `last`. */
static void trim(int runs, long start, long n, float (*tau)[BLOCK], const float *threshold, const int64_t *last, int64_t *kept)
{
    for (int t = 0; t < runs; t++) {
        int count = 0;
        int equal = last[t] < start ? 0 : (int)(last[t] - start < n ? last[t] - start + 1 : n);
        if (equal == 0 || equal == n) { /* all elements equal to the threshold are kept, or none */
            int32_t least = (int32_t)as_bits(threshold[t]) + (equal == 0);
#pragma omp simd reduction(+ : count)
            for (long i = 0; i < BLOCK; i++) {
                int in = (int32_t)(as_bits(tau[t][i]) & 0x7fffffff) >= least;
                tau[t][i] = in ? tau[t][i] : 0;
                count += tau[t][i] != 0;
            }
        } else {
#pragma omp simd reduction(+ : count)
            for (long i = 0; i < BLOCK; i++) {
                float size = fabsf(tau[t][i]);
                int in = size > threshold[t] || (size == threshold[t] && (int)i < equal);
                tau[t][i] = in ? tau[t][i] : 0;
                count += tau[t][i] != 0;
            }
        }
        kept[t] += count;
    }
}

enum elect { SUM, WEIGHTED, COUNT };
enum aggregate { MEAN, NUMBER, ADD, MAX };

/* One run's vote in the election of the sign */
static void cast(int elect, float weight, const float *restrict tau, float *restrict vote)
{
    if (elect == SUM)
        memcpy(vote, tau, BLOCK * sizeof(float));
    else if (elect == WEIGHTED)
#pragma omp simd
        for (long i = 0; i < BLOCK; i++)
            vote[i] = weight * tau[i];
    else
#pragma omp simd
        for (long i = 0; i < BLOCK; i++)
            vote[i] = (float)((tau[i] > 0) - (tau[i] < 0));
}

static void balance_of(int runs, const float (*tau)[BLOCK], const float *weights, int elect, float *restrict balance)
{
    float vote[BLOCK];
    cast(elect, weights[0], tau[0], balance);
    for (int t = 1; t < runs; t++) {
        cast(elect, weights[t], tau[t], vote);
#pragma omp simd
        for (long i = 0; i < BLOCK; i++)
            balance[i] += vote[i];
    }
}

/* Merge the elements that have the elected sign (`majority` where the election is a draw). */
static void consensus(int runs, const float (*tau)[BLOCK], const float *weights, int elect, int aggregate, int majority,
                      float *restrict merged)
{
    float balance[BLOCK], vote[BLOCK], term[BLOCK], share[BLOCK] = {0};
    balance_of(runs, tau, weights, elect, balance);
    memset(merged, 0, BLOCK * sizeof(float));
    for (int t = 0; t < runs; t++) {
        float weight = weights[t], unit = aggregate == MEAN ? weight : 1;
        cast(elect, weight, tau[t], vote);
#pragma omp simd
        for (long i = 0; i < BLOCK; i++) {
            int positive = (balance[i] > 0) | ((majority > 0) & (balance[i] == 0));
            int agrees = (positive & (vote[i] > 0)) | (!positive & (vote[i] < 0));
            float step = weight * tau[t][i], more = share[i] + unit; /* outside of ?:, which would become a branch */
            term[i] = agrees ? step : 0;
            share[i] = agrees ? more : share[i];
        }
        if (aggregate == MAX)
#pragma omp simd
            for (long i = 0; i < BLOCK; i++)
                merged[i] = fabsf(term[i]) > fabsf(merged[i]) ? term[i] : merged[i];
        else
#pragma omp simd
            for (long i = 0; i < BLOCK; i++)
                merged[i] += term[i];
    }
    if (aggregate == MEAN || aggregate == NUMBER)
#pragma omp simd
        for (long i = 0; i < BLOCK; i++)
            merged[i] /= share[i] + (float)(share[i] == 0);
}

/* Sums of products in double, eight at a time */
typedef double lanes __attribute__((vector_size(64), may_alias));
typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
#define LANES 8
enum more { MERGED, MERGED_MEAN, MEAN_MEAN, KEPT, ERROR, STEP, MORE }; /* sums that follow those of pairs of runs */
#define FUSED __attribute__((optimize("O3,fp-contract=fast"))) /* these sums need not match another implementation bit for bit */

static inline __attribute__((always_inline)) lanes widened(const float *x)
{
    return __builtin_convertvector(*(const floats *)x, lanes);
}

#ifdef __AVX512F__
#define TILE 5 /* tile size at which the sums of all pairs fit into the registers */
#else
#define TILE 2
#endif

static int pair(int runs, int t, int u) { return t * runs - t * (t - 1) / 2 + u - t; }

/* Products of runs x and runs y, all kept in registers while the block is read once */
static inline FUSED __attribute__((always_inline)) void tile(int rows, int columns, int triangle, const float (*x)[BLOCK],
                                                       const float (*y)[BLOCK], int t, int runs, lanes *sums)
{
    lanes sum[TILE][TILE] = {{{0}}};
    for (long i = 0; i < BLOCK; i += LANES) {
        lanes first[TILE], second[TILE];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            first[r] = widened(x[r] + i);
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++)
            second[c] = triangle ? first[c] : widened(y[c] + i);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int c = triangle ? r : 0; c < columns; c++)
                sum[r][c] += first[r] * second[c];
    }
    int u = t + (int)(y - x);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = triangle ? r : 0; c < columns; c++)
            sums[pair(runs, t + r, u + c)] += sum[r][c];
}

/* Products of all pairs (t, u) of runs, t <= u */
FUSED static void add_pairs(int runs, const float (*tau)[BLOCK], lanes *sums)
{
    int t = 0;
    for (; t + TILE <= runs; t += TILE) {
        int u = t + TILE;
        tile(TILE, TILE, 1, tau + t, tau + t, t, runs, sums);
        for (; u + TILE <= runs; u += TILE)
            tile(TILE, TILE, 0, tau + t, tau + u, t, runs, sums);
        for (; u < runs; u++)
            tile(TILE, 1, 0, tau + t, tau + u, t, runs, sums);
    }
    for (; t < runs; t++)
        for (int u = t; u < runs; u++)
            tile(1, 1, 0, tau + t, tau + u, t, runs, sums);
}

/* One bit per element */
#define WORDS (BLOCK / 64)
struct bits {
    uint64_t moved[WORDS], minus[WORDS];
};

static void signs_of(const float *x, struct bits *found)
{
#ifdef __AVX512F__
    uint16_t *moved = (uint16_t *)found->moved, *minus = (uint16_t *)found->minus;
    for (long i = 0; i < BLOCK; i += 16) {
        __m512i bits = _mm512_loadu_si512(x + i);
        moved[i / 16] = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7fffffff));
        minus[i / 16] = _mm512_cmplt_epi32_mask(bits, _mm512_setzero_si512());
    }
#else
    for (long w = 0; w < WORDS; w++) {
        uint64_t moved = 0, minus = 0;
        for (long i = 0; i < 64; i++) {
            moved |= (uint64_t)(x[64 * w + i] != 0) << i;
            minus |= (uint64_t)(as_bits(x[64 * w + i]) >> 31) << i;
        }
        found->moved[w] = moved;
        found->minus[w] = minus;
    }
#endif
}

/* Counts of pairs of runs (t, u), t <= u, word by word */
struct common {
    int64_t shared[WORDS]; /* elements that both move */
    int64_t apart[WORDS];  /* elements that they move in opposite directions */
};

static void count_signs(int runs, const float (*tau)[BLOCK], struct common *pairs, int64_t *moved)
{
    struct bits of[MOST_RUNS];
    uint64_t any[WORDS] = {0};
    int64_t some = 0;
    for (int t = 0; t < runs; t++) {
        signs_of(tau[t], &of[t]);
        for (int w = 0; w < WORDS; w++)
            any[w] |= of[t].moved[w];
    }
    for (int w = 0; w < WORDS; w++)
        some += __builtin_popcountll(any[w]);
    *moved += some;
    for (int t = 0; t < runs; t++)
        for (int u = t; u < runs; u++, pairs++)
            for (int w = 0; w < WORDS; w++) {
                uint64_t both = of[t].moved[w] & of[u].moved[w];
                pairs->shared[w] += __builtin_popcountll(both);
                pairs->apart[w] += __builtin_popcountll(both & (of[t].minus[w] ^ of[u].minus[w]));
            }
}

/* Add the counts of all pairs to matrices (runs, runs): elements that both move, and of these the ones moved in the same direction
 * minus those moved in opposite directions. */
static void add_counts(int runs, const struct common *pairs, int64_t *signs, int64_t *shared)
{
    for (int t = 0; t < runs; t++)
        for (int u = t; u < runs; u++, pairs++) {
            int64_t both = 0, apart = 0;
            for (int w = 0; w < WORDS; w++) {
                both += pairs->shared[w];
                apart += pairs->apart[w];
            }
            shared[t * runs + u] += both;
            signs[t * runs + u] += both - 2 * apart;
            shared[u * runs + t] = shared[t * runs + u];
            signs[u * runs + t] = signs[t * runs + u];
        }
}

static void mean_of(int runs, const float (*tau)[BLOCK], float *restrict mean)
{
    memcpy(mean, tau[0], BLOCK * sizeof(float));
    for (int t = 1; t < runs; t++)
#pragma omp simd
        for (long i = 0; i < BLOCK; i++)
            mean[i] += tau[t][i];
#pragma omp simd
    for (long i = 0; i < BLOCK; i++)
        mean[i] /= runs;
}

/* Products of merged and mean, and of the mean where merged is not zero */
FUSED static void add_merged(const float *merged, const float *mean, lanes *sums, int64_t *kept)
{
    float kept_mean[BLOCK];
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (long i = 0; i < BLOCK; i++) {
        kept_mean[i] = merged[i] != 0 ? mean[i] : 0;
        count += merged[i] != 0;
    }
    *kept += count;
    lanes sum[4] = {{0}};
    for (long i = 0; i < BLOCK; i += LANES) {
        lanes m = widened(merged + i), a = widened(mean + i), k = widened(kept_mean + i);
        sum[0] += m * m;
        sum[1] += m * a;
        sum[2] += a * a;
        sum[3] += k * k;
    }
    sums[MERGED] += sum[0];
    sums[MERGED_MEAN] += sum[1];
    sums[MEAN_MEAN] += sum[2];
    sums[KEPT] += sum[3];
}

/* Squared lengths of the rounding error and of the step */
FUSED static void add_loss(const float *error, const float *step, lanes *sums)
{
    lanes sum[2][2] = {{{0}}};
    for (long i = 0; i < BLOCK; i += 2 * LANES)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            lanes e = widened(error + i + c * LANES), s = widened(step + i + c * LANES);
            sum[0][c] += e * e;
            sum[1][c] += s * s;
        }
    sums[ERROR] += sum[0][0] + sum[0][1];
    sums[STEP] += sum[1][0] + sum[1][1];
}

/* out = theta_0 + scale tau, rounded once, with the rounding error of scale tau; returns whether the output is finite. */
static int finish(const struct job *job, long at, long n, const float *origin, const float *tau, lanes *sums, int64_t *counts)
{
    float step[BLOCK], theta[BLOCK], near[BLOCK], still[BLOCK], error[BLOCK];
    char written[BLOCK * sizeof(float)];
    int stepped = 0, unchanged = 0;
    long size = job->out_kind == F32 ? 4 : 2;
#pragma omp simd
    for (long i = 0; i < BLOCK; i++) {
        step[i] = job->scale * tau[i];
        theta[i] = origin[i] + step[i];
    }
    if (job->out_kind == job->base_kind)
        memcpy(still, origin, sizeof still);
    else
        round_block(job->out_kind, origin, still, written);
    round_block(job->out_kind, theta, near, written);
#pragma omp simd reduction(+ : stepped, unchanged)
    for (long i = 0; i < BLOCK; i++) {
        stepped += step[i] != 0;
        unchanged += step[i] != 0 && near[i] == still[i];
        error[i] = near[i] - origin[i] - step[i];
    }
    add_loss(error, step, sums);
    counts[0] += stepped;
    counts[1] += unchanged;
    memcpy((char *)job->out + at * size, written, n * size);
    return all_finite(theta) && all_finite(near);
}

/* One thread's work on a tensor */
struct task {
    const struct job *job;
    float (*tau)[BLOCK];
    float *panels; /* for each run, if some task vectors are products */
    long room;     /* of a panel */
    lanes *sums;
    struct common *pairs;
    int64_t *counts;
};

/* Whether a weighted sum divided by the number of runs is the mean, to the bit */
static int is_mean(const struct job *job, int divides)
{
    for (int t = 0; t < job->runs; t++)
        if (job->weights[t] != 1)
            return 0;
    return divides;
}

/* Merge n elements from `at` on, whose products lie in the panels from `offset` on. */
static int merge_block(void *context, long at, long n, long offset)
{
    struct task *task = context;
    const struct job *job = task->job;
    int runs = job->runs, pairs = runs * (runs + 1) / 2;
    int64_t *counts = task->counts, *moved = counts + runs + 2 * runs * runs, *kept = moved + 1;
    float origin[BLOCK], mean[BLOCK], merged[BLOCK], (*tau)[BLOCK] = task->tau;
    lanes *sums = task->sums;
    decode(job->base, job->base_kind, at, n, origin);
    for (int t = 0; t < runs; t++) {
        if (job->kinds[t] == FACTORS)
            decode(task->panels + t * task->room, F32, offset, n, tau[t]);
        else
            task_vector(job->theta[t], job->kinds[t], origin, at, n, tau[t]);
        if (!all_finite(tau[t]))
            return 3 + t;
    }
    if (job->method == BALANCE) {
        trim(runs, at, n, tau, job->numbers, job->last, counts);
        balance_of(runs, tau, job->weights, job->options[0], merged);
        for (long i = 0; i < BLOCK; i++)
            *moved += (merged[i] > 0) - (merged[i] < 0);
        return 0;
    }
    add_pairs(runs, tau, sums);
    count_signs(runs, tau, task->pairs, moved);
    mean_of(runs, tau, mean);
    if (job->method == TIES) {
        trim(runs, at, n, tau, job->numbers, job->last, counts);
        consensus(runs, tau, job->weights, job->options[0], job->options[1], job->options[2], merged);
    } else {
        int divides = job->options[job->method == TALL_MASK];
        if (is_mean(job, divides))
            memcpy(merged, mean, sizeof merged);
        else {
            weighted_sum(runs, tau, job->weights, merged);
            if (divides)
#pragma omp simd
                for (long i = 0; i < BLOCK; i++)
                    merged[i] /= runs;
        }
        if (job->method == TALL_MASK)
            tall_mask(runs, tau, job->numbers, job->options[0], merged, counts);
    }
    add_merged(merged, mean, sums + pairs, kept);
    if (job->merged)
        memcpy(job->merged + at, merged, n * sizeof(float));
    return !job->out || finish(job, at, n, origin, merged, sums + pairs, kept + 1) ? 0 : 2;
}

/* Memory in whole cache lines, zeroed */
static void *lines(size_t size)
{
    size = (size + 63) / 64 * 64;
    void *found = aligned_alloc(64, size);
    return found ? memset(found, 0, size) : NULL;
}

/* Merge elements start ... stop - 1. One call for all elements and several calls for parts that begin at multiples of PIECE give
 * the same result.
 *
 * sums: (pieces, runs (runs + 1) / 2 + MORE). counts: masked (runs), signs, shared (runs, runs), moved, kept; and, if there is
 * output, the number of elements that the merge moves, and of these the number that round to the base's value. */
int merge(const struct job *job, long start, long stop, double *sums, int64_t *counts)
{
    int runs = job->runs, pairs = runs * (runs + 1) / 2, number = pairs + MORE, status = 0;
    const struct factors *products[MOST_RUNS];
    long columns = 0;
    for (int t = 0; t < runs; t++) {
        products[t] = job->kinds[t] == FACTORS ? job->theta[t] : NULL;
        columns = products[t] ? products[t]->columns : columns;
    }
    struct task task = {.job = job, .room = columns ? panel_room(columns) : 0, .counts = counts};
    task.tau = lines(runs * sizeof *task.tau);
    task.panels = lines(runs * task.room * sizeof(float) + 1);
    task.sums = lines(number * sizeof *task.sums);
    task.pairs = lines(pairs * sizeof *task.pairs);
    if (!task.tau || !task.panels || !task.sums || !task.pairs)
        status = 1;
    for (long piece = start; piece < stop && !status; piece += PIECE, sums += number) {
        long end = stop - piece < PIECE ? stop : piece + PIECE;
        memset(task.sums, 0, number * sizeof *task.sums);
        if (columns)
            status = visit_products(products, runs, columns, piece, end, task.panels, merge_block, &task);
        for (long at = piece; !columns && at < end && !status; at += BLOCK)
            status = merge_block(&task, at, end - at < BLOCK ? end - at : BLOCK, 0);
        for (int i = 0; i < number; i++)
            for (int l = 0; l < LANES; l++)
                sums[i] += task.sums[i][l];
    }
    if (!status)
        add_counts(runs, task.pairs, counts + runs, counts + runs + runs * runs);
    free(task.tau);
    free(task.panels);
    free(task.sums);
    free(task.pairs);
    return status;
}

/* Every step-th magnitude of one run, as a bit pattern, which sorts like the magnitude */
void sample(const struct job *job, int run, long size, long step, int32_t *patterns)
{
    int kind = job->kinds[run];
    for (long at = 0; at < size; at += step) {
        float tau = 0;
        if (kind == FACTORS)
            multiply_out(job->theta[run], at, 1, &tau);
        else if (kind != STILL)
            tau = element(job->theta[run], kind == DELTA ? F32 : kind, at);
        if (kind < DELTA)
            tau -= element(job->base, job->base_kind, at);
        *patterns++ = (int32_t)(as_bits(tau) & 0x7fffffff);
    }
}

/* Append the patterns that are `in` to `inside`, up to its room; returns the new number of patterns. */
static int64_t keep(const int32_t *bits, const uint8_t *in, int32_t *inside, int64_t held, int64_t room)
{
    long i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    for (; i < BLOCK && held + BLOCK <= room; i += 16) {
        __mmask16 some = _mm_test_epi8_mask(_mm_loadu_si128((const void *)(in + i)), _mm_set1_epi8(1));
        _mm512_storeu_si512(inside + held, _mm512_maskz_compress_epi32(some, _mm512_loadu_si512(bits + i)));
        held += __builtin_popcount(some);
    }
#endif
    for (; i < BLOCK; i += 8) { /* few patterns are inside */
        uint64_t some;
        memcpy(&some, in + i, 8);
        for (long j = i; some && j < i + 8; j++)
            if (in[j]) {
                if (held < room)
                    inside[held] = bits[j];
                held++;
            }
    }
    return held;
}

/* Compare the magnitudes of one run, as bit patterns, with a bracket: count, for each piece, those below `low`, equal to it, equal
 * to `high`, and in between (pieces, 4); append the patterns in between to `inside`, up to `room` of them. */
int collect(const struct job *job, int run, long size, int32_t low, int32_t high, int64_t room, int64_t *counts, int32_t *inside)
{
    int64_t held = 0;
    float origin[BLOCK], tau[BLOCK];
    int32_t bits[BLOCK];
    uint8_t in[BLOCK];
    for (long at = 0; at < size; at += BLOCK) {
        long n = size - at < BLOCK ? size - at : BLOCK;
        int below = 0, lowest = 0, highest = 0;
        decode(job->base, job->base_kind, at, n, origin);
        task_vector(job->theta[run], job->kinds[run], origin, at, n, tau);
        if (!all_finite(tau))
            return 3 + run;
#pragma omp simd reduction(+ : below, lowest, highest)
        for (long i = 0; i < n; i++) {
            bits[i] = (int32_t)(as_bits(tau[i]) & 0x7fffffff);
            in[i] = bits[i] > low && bits[i] < high;
            below += bits[i] < low;
            lowest += bits[i] == low;
            highest += bits[i] == high;
        }
        memset(in + n, 0, BLOCK - n);
        int64_t before = held, *of_piece = counts + at / PIECE * 4;
        held = keep(bits, in, inside, held, room);
        of_piece[0] += below, of_piece[1] += lowest, of_piece[2] += highest, of_piece[3] += held - before;
    }
    return 0;
}

/* Index of the n-th element (from 1) of one run, from `start` on, whose magnitude is exactly `value`; -1 if there are fewer. */
int64_t place_of_equal(const struct job *job, int run, long start, long size, float value, int64_t nth)
{
    float origin[BLOCK], tau[BLOCK];
    for (long at = start; at < size; at += BLOCK) {
        long n = size - at < BLOCK ? size - at : BLOCK;
        decode(job->base, job->base_kind, at, n, origin);
        task_vector(job->theta[run], job->kinds[run], origin, at, n, tau);
        int equal = 0;
#pragma omp simd reduction(+ : equal)
        for (long i = 0; i < n; i++)
            equal += fabsf(tau[i]) == value;
        if (equal < nth) {
            nth -= equal;
            continue;
        }
        for (long i = 0; i < n; i++)
            if (fabsf(tau[i]) == value && --nth == 0)
                return at + i;
    }
    return -1;
}
