/* Add a change to a tensor and round the sum once, in a single pass over memory; the sums for the rounding loss are accumulated
 * on the way, in double, PIECE elements at a time. A change may be given as a product of factors, which is then computed block by
 * block. The order of operations is that of torch, so that the tensors agree bit for bit. */

#include "../native.h"

#define LANES 8
#define FUSED __attribute__((optimize("O3,fp-contract=fast"))) /* sums need not match another implementation bit for bit */
typedef double lanes __attribute__((vector_size(64), may_alias));
typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));

/* Add the squares of two blocks. */
FUSED static void add_squares(const float *x, const float *y, lanes *sums)
{
    lanes first[2] = {{0}}, second[2] = {{0}};
    for (long i = 0; i < BLOCK; i += 2 * LANES)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            lanes a = __builtin_convertvector(*(const floats *)(x + i + c * LANES), lanes);
            lanes b = __builtin_convertvector(*(const floats *)(y + i + c * LANES), lanes);
            first[c] += a * a;
            second[c] += b * b;
        }
    sums[0] += first[0] + first[1];
    sums[1] += second[0] + second[1];
}

struct task {
    const void *base;
    const float *delta; /* the change, or the panel with some of it */
    void *out;
    int base_kind, out_kind;
    lanes sums[2];
    int64_t *counts;
};

/* n elements from `at` on, whose change lies at `offset`. Returns 0, or 2 if a value to be written is not finite. */
static int round_block_of(void *context, long at, long n, long offset)
{
    struct task *task = context;
    float old[BLOCK], step[BLOCK], new[BLOCK], near[BLOCK], alone[BLOCK], lost[BLOCK];
    char written[BLOCK * sizeof(float)];
    long size = task->out_kind == F32 ? 4 : 2;
    decode(task->base, task->base_kind, at, n, old);
    decode(task->delta, F32, offset, n, step);
#pragma omp simd
    for (long i = 0; i < BLOCK; i++)
        new[i] = old[i] + step[i];
    if (task->base_kind == task->out_kind)
        memcpy(alone, old, sizeof alone);
    else
        round_block(task->out_kind, old, alone, written);
    if (!all_finite(new))
        return 2;
    round_block(task->out_kind, new, near, written);
    if (!all_finite(near))
        return 2;
    int moved = 0, unchanged = 0;
#pragma omp simd reduction(+ : moved, unchanged)
    for (long i = 0; i < BLOCK; i++) {
        lost[i] = (near[i] - old[i]) - step[i];
        moved += step[i] != 0;
        unchanged += (step[i] != 0) & (near[i] == alone[i]);
    }
    task->counts[0] += moved;
    task->counts[1] += unchanged;
    add_squares(lost, step, task->sums);
    memcpy((char *)task->out + at * size, written, n * size);
    return 0;
}

/* out = round(base + change) from `start`, a multiple of PIECE, to `stop`. The change is `delta`, or `factors` if that is NULL.
 * sums: for each piece, the squared length of the rounding error and of the change. counts: elements that change, and how many of
 * these are written as the base, rounded alone, would be. Returns 0; 1 if out of memory; 2 if a value to be written is not
 * finite. */
int round_sum(const void *base, int base_kind, const float *delta, const struct factors *factors, void *out, int out_kind,
              long start, long stop, double *sums, int64_t *counts)
{
    float *panel = delta ? NULL : malloc(panel_room(factors->columns) * sizeof(float));
    if (!delta && !panel)
        return 1;
    struct task task = {base, delta ? delta : panel, out, base_kind, out_kind, {{0}}, counts};
    int status = 0;
    for (long piece = start; piece < stop && !status; piece += PIECE, sums += 2) {
        long end = piece + PIECE < stop ? piece + PIECE : stop;
        memset(task.sums, 0, sizeof task.sums);
        if (!delta)
            status = visit_products(&factors, 1, factors->columns, piece, end, panel, round_block_of, &task);
        for (long at = piece; delta && at < end && !status; at += BLOCK)
            status = round_block_of(&task, at, end - at < BLOCK ? end - at : BLOCK, at);
        for (int i = 0; i < 2; i++) {
            sums[i] = 0;
            for (int l = 0; l < LANES; l++)
                sums[i] += task.sums[i][l];
        }
    }
    free(panel);
    return status;
}

/* out = the product of factors, from `start` to `stop` */
void multiply(const struct factors *factors, float *out, long start, long stop)
{
    multiply_out(factors, start, stop - start, out + start);
}

/* Whether n elements from `start` on are finite */
int are_finite(const void *data, int kind, long start, long stop)
{
    float block[BLOCK];
    for (long at = start; at < stop; at += BLOCK) {
        decode(data, kind, at, stop - at < BLOCK ? stop - at : BLOCK, block);
        if (!all_finite(block))
            return 0;
    }
    return 1;
}
