/* The loops of fused.py: float32 on a CPU, one pass over the weights where torch makes one for each operation.
 *
 * Plain C that a compiler turns into vector instructions: neither branches nor calls of the mathematical library in a
 * loop. What is evaluated is in kernels.py and divergence.py. The logarithm is the series of 2 artanh, the exponential
 * that of Taylor, both exact to rounding on the interval to which the exponent's bits reduce their argument.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Clones need a C library with indirect functions, and a compiler that knows these levels of processors. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

enum { CHUNK = 256 }; /* what is done to a chunk in turn stays in the nearest cache */
const int32_t chunk_size = CHUNK; /* there is a sum for each chunk */
const int32_t interface = 1;      /* as in fused.py: raised when what a function is called with changes */

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* log(x) of a positive normal number, and some finite number for any other. */
INLINE float log_of(float x) {
    int32_t exponent = (int32_t)(bits_of(x) - bits_of(0.70710678f)) >> 23; /* so that 1/√2 <= mantissa < √2 */
    float mantissa = of_bits(bits_of(x) - ((uint32_t)exponent << 23));
    float t = (mantissa - 1) / (mantissa + 1), square = t * t;
    float series = 1 + square * (1 / 3.f + square * (1 / 5.f + square * (1 / 7.f + square / 9.f)));
    return (float)exponent * 0.69314718f + 2 * t * series;
}

/* log(1 + x), with 1 / (1 + x). */
INLINE float log1p_of(float x, float inverse) {
    float sum = 1 + x, lost = x - (sum - 1); /* what rounding took from the sum */
    float found = log_of(sum) + lost * inverse;
    return x <= FLT_MAX ? found : x; /* for log_of would make numbers of infinity and of NaN */
}

/* exp(x) of an x in [-170, 170]; of NaN, the power is some number, and the series NaN. */
INLINE float exp_of(float x) {
    float powers = x * 1.44269504f;
    int32_t power = (int32_t)(powers + copysignf(0.5f, powers)), half = power >> 1;
    /* log 2 in two parts, the first of few bits */
    float rest = x - (float)power * 0.693359375f + (float)power * 2.12194440e-4f;
    float series = 1 / 120.f + rest * (1 / 720.f + rest / 5040.f);
    series = 1 + rest * (1 + rest * (1 / 2.f + rest * (1 / 6.f + rest * (1 / 24.f + rest * series))));
    /* 2 to that power in two factors, since as one it may be beyond the normal numbers where the result is not */
    return series * of_bits((uint32_t)(half + 127) << 23) * of_bits((uint32_t)(power - half + 127) << 23);
}

/* Two polynomials of as many coefficients, lowest power first. */
struct rational {
    int32_t terms;
    float numerator[16], denominator[16];
};

struct constants {
    float k1, k2, k3;
    struct rational growth, dawson;
};

INLINE void horner(const float *coefficients, int32_t terms, const float *t, float *out) {
    for (int i = 0; i < CHUNK; i++) out[i] = coefficients[terms - 1];
    for (int32_t k = terms - 2; k >= 0; k--)
        for (int i = 0; i < CHUNK; i++) out[i] = out[i] * t[i] + coefficients[k];
}

INLINE void quotient(const struct rational *of, const float *t, float *out) {
    float denominator[CHUNK];
    horner(of->numerator, of->terms, t, out);
    horner(of->denominator, of->terms, t, denominator);
    for (int i = 0; i < CHUNK; i++) out[i] /= denominator[i];
}

/* The kernels overwrite a = 1/α with twice the derivative, and value with twice the divergence. */
typedef void kernel(float *restrict a, float *restrict value, const struct constants *);

FOR_EACH_PROCESSOR static void approximate(float *restrict a, float *restrict value, const struct constants *of) {
    const float k1 = of->k1, k2 = of->k2, k3 = of->k3;
    for (int i = 0; i < CHUNK; i++) {
        float z = k3 * log_of(a[i]) - k2;
        float tail = exp_of(-fabsf(z)), share = 1 / (1 + tail), other = tail * share; /* sigmoid(|z|), sigmoid(-|z|) */
        float inverse = 1 / (1 + a[i]);
        value[i] = log1p_of(a[i], inverse) + 2 * k1 * (z > 0 ? share : other);
        a[i] = inverse + 2 * k1 * k3 * share * other / (a[i] > FLT_MIN ? a[i] : FLT_MIN);
    }
}

FOR_EACH_PROCESSOR static void exact(float *restrict a, float *restrict value, const struct constants *of) {
    float t[CHUNK], growth[CHUNK], dawson[CHUNK];
    for (int i = 0; i < CHUNK; i++) t[i] = 1 - 32 / (a[i] + 16);
    quotient(&of->growth, t, growth);
    quotient(&of->dawson, t, dawson);
    for (int i = 0; i < CHUNK; i++) value[i] = log1p_of(a[i] * growth[i], 1 / (1 + a[i] * growth[i]));
    for (int i = 0; i < CHUNK; i++) a[i] = dawson[i] / (1 + a[i]);
}

FOR_EACH_PROCESSOR static void ard(float *restrict a, float *restrict value, const struct constants *unused) {
    (void)unused;
    for (int i = 0; i < CHUNK; i++) {
        float inverse = 1 / (1 + a[i]);
        value[i] = log1p_of(a[i], inverse);
        a[i] = inverse;
    }
}

FOR_EACH_PROCESSOR static void inverse_alpha(const float *loc, const float *variance, float *restrict a, int64_t count) {
    for (int64_t i = 0; i < count; i++) a[i] = loc[i] * loc[i] / variance[i];
}

FOR_EACH_PROCESSOR static float sum_of(const float *value, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += value[i];
    return sum;
}

/* The bounds are arguments because a compiler that knows them makes branches of the comparisons, and no vectors. */
FOR_EACH_PROCESSOR static void exp_chunk(const float *x, float *restrict out, int64_t count, float low, float high) {
    for (int64_t i = 0; i < count; i++) {
        float bounded = x[i] < low ? low : x[i];
        out[i] = exp_of(bounded > high ? high : bounded);
    }
}

FOR_EACH_PROCESSOR static void add_noise_chunk(float *restrict output, float *restrict variance, const float *noise,
                                               int64_t count, float smallest) {
    for (int64_t i = 0; i < count; i++) {
        float std = sqrtf(variance[i] < smallest ? smallest : variance[i]);
        output[i] += std * noise[i];
        variance[i] = noise[i] / std;
    }
}

FOR_EACH_PROCESSOR static void finish_chunk(float *restrict grad_loc, float *restrict grad_variance, const float *loc,
                                            const float *variance, const float *derivative, int64_t count, float grad) {
    for (int64_t i = 0; i < count; i++) {
        float of_divergence = loc[i] / variance[i] * derivative[i] * grad;
        grad_loc[i] += of_divergence;
        grad_variance[i] = grad_variance[i] * variance[i] * 0.5f - of_divergence * loc[i] * 0.5f;
    }
}

INLINE int64_t length_of(int64_t start, int64_t count) { return count - start < CHUNK ? count - start : CHUNK; }

/* Writes twice the derivatives, twice the divergences unless value is NULL, and the sum of these of each chunk. */
void divergence(const float *loc, const float *variance, float *derivative, int64_t count, int threads, int form,
                const struct constants *constants, float *value, double *sums) {
    kernel *const kernels[] = {approximate, exact, ard};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += CHUNK) {
        float a[CHUNK] = {0}, of_chunk[CHUNK];
        int64_t length = length_of(start, count);
        inverse_alpha(loc + start, variance + start, a, length);
        kernels[form](a, of_chunk, constants);
        memcpy(derivative + start, a, (size_t)length * sizeof *a);
        if (value) memcpy(value + start, of_chunk, (size_t)length * sizeof *a);
        sums[start / CHUNK] = sum_of(of_chunk, length);
    }
}

void exponential(const float *x, float *out, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += CHUNK)
        exp_chunk(x + start, out + start, length_of(start, count), -104, 89);
}

/* Adds noise of a variance to an output, and overwrites the variance with noise / standard deviation. */
void add_noise(float *output, float *variance, const float *noise, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += CHUNK)
        add_noise_chunk(output + start, variance + start, noise + start, length_of(start, count), FLT_MIN);
}

/* Turns twice the gradient in σ² into that in log σ², and adds the gradients of the divergence. */
void finish_gradients(float *grad_loc, float *grad_variance, const float *loc, const float *variance,
                      const float *derivative, int64_t count, int threads, float grad) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += CHUNK)
        finish_chunk(grad_loc + start, grad_variance + start, loc + start, variance + start, derivative + start,
                     length_of(start, count), grad);
}
