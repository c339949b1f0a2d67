/* The rules of EmoAiry, EmoCats, EmoTion and EmoVoid on lists of contiguous tensors: every weight and gradient is read from
 * memory once. The formulas and notation are those of reference.py; REAL is float or double.
 *
 * A tensor is processed by one thread, front to back, so that no result depends on the number of threads. The functions
 * return 0, or 1 if out of memory. */

#include <math.h>
#include <stdlib.h>

#define BLOCK 4096 /* elements summed in REAL before the sum is continued in double */

typedef REAL *const restrict *tensors;

static inline REAL sign(REAL x) { return (REAL)((x > 0) - (x < 0)); }

static inline REAL lerp(REAL a, REAL b, REAL weight) { return a + weight * (b - a); }

/* rho = |<W,G>| / (|W| |G| + eps) */
static double relation(long n, const REAL *restrict w, const REAL *restrict g, double eps)
{
    double wg = 0, ww = 0, gg = 0;
    for (long start = 0; start < n; start += BLOCK) {
        long end = start + BLOCK < n ? start + BLOCK : n;
        REAL a = 0, b = 0, c = 0;
#pragma omp simd reduction(+ : a, b, c)
        for (long i = start; i < end; i++) {
            a += w[i] * g[i];
            b += w[i] * w[i];
            c += g[i] * g[i];
        }
        wg += a, ww += b, gg += c;
    }
    double rho = fabs(wg) / (sqrt(ww) * sqrt(gg) + eps);
    return rho > 1 ? 1 : rho; /* fmin would take NaN for 1 */
}

int geom_relation(long count, const long *size, tensors w, tensors g, double *const *rho, double eps)
{
    for (long k = 0; k < count; k++)
        *rho[k] = relation(size[k], w[k], g[k], eps);
    return 0;
}

/* W <- W(1 - lambda eta) - eta sign(lerp(m, G, 1 - b1));  m <- lerp(m, G, 1 - b2) */
int cats(long count, const long *size, tensors w_, tensors g_, tensors m_, double beta1, double beta2, double decay, double rate)
{
    REAL now = 1 - beta1, later = 1 - beta2, shrink = decay * rate, eta = rate;
    for (long k = 0; k < count; k++) {
        REAL *restrict w = w_[k], *restrict m = m_[k];
        const REAL *restrict g = g_[k];
#pragma omp simd
        for (long i = 0; i < size[k]; i++) {
            w[i] -= shrink * w[i] + eta * sign(lerp(m[i], g[i], now));
            m[i] = lerp(m[i], g[i], later);
        }
    }
    return 0;
}

/* r <- lerp(r, mean over a row of G^2, 1 - b2);  c <- the same over a column;  W <- W(1 - lambda eta) - eta sign(G) */
int airy(long count, const long *rows, const long *columns, tensors w_, tensors g_, tensors r_, tensors c_, double beta2,
         double decay, double rate)
{
    REAL weight = 1 - beta2, shrink = decay * rate, eta = rate;
    for (long k = 0; k < count; k++) {
        long n = columns[k];
        REAL *restrict r = r_[k], *restrict c = c_[k];
        double *restrict sum = calloc(n ? n : 1, sizeof(double));
        if (!sum)
            return 1;
        for (long row = 0; row < rows[k]; row++) {
            REAL *restrict w = w_[k] + row * n;
            const REAL *restrict g = g_[k] + row * n;
            double total = 0;
            for (long start = 0; start < n; start += BLOCK) {
                long end = start + BLOCK < n ? start + BLOCK : n;
                REAL part = 0;
#pragma omp simd reduction(+ : part)
                for (long i = start; i < end; i++) {
                    REAL square = g[i] * g[i];
                    part += square;
                    sum[i] += square;
                    w[i] -= shrink * w[i] + eta * sign(g[i]);
                }
                total += part;
            }
            r[row] = lerp(r[row], total / n, weight);
        }
        for (long i = 0; i < n; i++)
            c[i] = lerp(c[i], sum[i] / rows[k], weight);
        free(sum);
    }
    return 0;
}

/* v <- lerp(v, G^2, 1 - b2);  W <- W(1 - lambda eta) - eta sign(G): tensors of one dimension */
int airy_1d(long count, const long *size, tensors w_, tensors g_, tensors v_, double beta2, double decay, double rate)
{
    REAL weight = 1 - beta2, shrink = decay * rate, eta = rate;
    for (long k = 0; k < count; k++) {
        REAL *restrict w = w_[k], *restrict v = v_[k];
        const REAL *restrict g = g_[k];
#pragma omp simd
        for (long i = 0; i < size[k]; i++) {
            v[i] = lerp(v[i], g[i] * g[i], weight);
            w[i] -= shrink * w[i] + eta * sign(g[i]);
        }
    }
    return 0;
}

/* rho_mean <- .9 rho_mean + .1 rho, from the first rho on;  m <- b1 m + (1 - b1)(1 - rho_mean) G;  W <- W(1 - lambda eta) - eta sign(m) */
int tion(long count, const long *size, tensors w_, tensors g_, tensors m_, tensors rho_mean, double beta1, double eps,
          double decay, double rate)
{
    REAL keep = beta1, shrink = decay * rate, eta = rate;
    for (long k = 0; k < count; k++) {
        REAL *restrict w = w_[k], *restrict m = m_[k];
        const REAL *restrict g = g_[k];
        double rho = relation(size[k], w, g, eps), before = *rho_mean[k];
        *rho_mean[k] = before < 0 ? rho : .9 * before + .1 * rho;
        REAL take = (1 - beta1) * (1 - *rho_mean[k]);
#pragma omp simd
        for (long i = 0; i < size[k]; i++) {
            m[i] = keep * m[i] + take * g[i];
            w[i] -= shrink * w[i] + eta * sign(m[i]);
        }
    }
    return 0;
}

/* W <- W - eta (1 - rho) sign(G) */
int void_(long count, const long *size, tensors w_, tensors g_, double eps, double rate)
{
    for (long k = 0; k < count; k++) {
        REAL *restrict w = w_[k];
        const REAL *restrict g = g_[k];
        REAL eta = rate * (1 - relation(size[k], w, g, eps));
#pragma omp simd
        for (long i = 0; i < size[k]; i++)
            w[i] -= eta * sign(g[i]);
    }
    return 0;
}
