/* Products of few rows, fast: stands in front of OpenBLAS's cblas_sgemm, which MLX calls.

   Decoding multiplies a few rows x by a matrix W of many, x W^T. OpenBLAS copies all of W into
   panels first, which pays for hundreds of rows. Here W is read once, where it lies, and the small
   x is turned instead, so that a vector holds one column of it:

       for every number w of W:   sums of W's row += w * (x's column, LANES rows at a time)

   One row alone is multiplied by each row of W. All other products go to OpenBLAS.
   setup.sh compiles this file for each kind of processor; blas.py loads it before OpenBLAS. */
#include <stdlib.h>

enum { ROW_MAJOR = 101, AS_IS = 111, TRANSPOSED = 112 };    /* cblas.h's numbers */

/* as many sums as a processor has registers for, less those of x and w */
#if defined __AVX512F__
enum { LANES = 16, VECTORS = 2, COLUMNS = 8 };
#elif defined __AVX2__
enum { LANES = 8, VECTORS = 2, COLUMNS = 6 };
#else
enum { LANES = 4, VECTORS = 4, COLUMNS = 6 };
#endif
enum {
    ROWS = LANES * VECTORS,     /* of x, at once */
    MOST = 64,                  /* rows; with more, OpenBLAS is as fast */
    DEEP = 128,                 /* numbers of a row; of fewer, putting away the sums costs too much */
    WORTH = 1 << 18,            /* multiplications; for fewer OpenBLAS has kernels that copy nothing */
    ALONE = 1 << 16,            /* fewer are done before a second thread would begin */
    LINE = 16                   /* numbers of a cache line */
};
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4)));     /* in memory */

typedef void (*gemm_t)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                       const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
static gemm_t gemm;
static int (*count_threads)(void);
static __thread float *turned;      /* x, as tile() reads it; kept from call to call */
static __thread size_t room;

void use_functions(gemm_t openblas_gemm, int (*openblas_get_num_threads)(void)) {
    gemm = openblas_gemm;
    count_threads = openblas_get_num_threads;
}

/* c (rows, columns) = alpha x w^T + beta c: x turned, (k, vectors * LANES); w (columns, k) */
static inline __attribute__((always_inline))
void tile(int vectors, int columns, int rows, int k, float alpha, const float *x,
          const float *w, long ldw, float beta, float *c, long ldc) {
    vector sums[COLUMNS][VECTORS];
    for (int j = 0; j < columns; j++)
        for (int v = 0; v < vectors; v++)
            sums[j][v] = (vector){0};
    for (int p = 0; p < k; p++) {
        if (p % LINE == 0)      /* a processor does not guess what the next tile will read */
            for (int j = 0; j < columns; j++)
                __builtin_prefetch(w + (j + columns) * ldw + p);
        const vector *column = (const vector *)x + (long)p * vectors;
        for (int j = 0; j < columns; j++)
            for (int v = 0; v < vectors; v++)
                sums[j][v] += w[j * ldw + p] * column[v];
    }
    for (int j = 0; j < columns; j++)
        for (int i = 0; i < rows; i++) {
            float *to = c + i * ldc + j;
            float sum = alpha * sums[j][i / LANES][i % LANES];
            *to = beta == 0 ? sum : sum + beta * *to;   /* with 0, c may hold anything, a NaN too */
        }
}

/* columns first to last of c (m, n), each tile of w for all rows while it is in the cache */
static void some_columns(int first, int last, int m, int k, float alpha, const float *x,
                         const float *w, long ldw, float beta, float *c, long ldc) {
    for (int j = first, columns; j < last; j += columns) {
        columns = last - j < COLUMNS ? 1 : COLUMNS;
        for (int i = 0; i < m; i += ROWS) {
            int rows = m - i < ROWS ? m - i : ROWS, vectors = rows <= LANES ? 1 : VECTORS;
            /* a loop is unrolled, and sums are registers, only where its ends are constants */
#define TILE(V, C) tile(V, C, rows, k, alpha, x + (long)i * k, w + j * ldw, ldw, beta, c + i * ldc + j, ldc)
            if (columns == 1 && vectors == 1) TILE(1, 1);
            else if (columns == 1) TILE(VECTORS, 1);
            else if (vectors == 1) TILE(1, COLUMNS);
            else TILE(VECTORS, COLUMNS);
        }
    }
}

/* x (m, k) to `turned`: (k, width) for each ROWS rows, the rows beyond m being 0 */
static int turn(int m, int k, const float *x, long ldx) {
    size_t needed = 4 * (size_t)(m + ROWS) * k;
    if (needed > room) {
        free(turned);
        turned = aligned_alloc(64, (needed + 63) / 64 * 64);
        room = turned ? needed : 0;
    }
    for (int i = 0; i < m && turned; i += ROWS) {
        int rows = m - i < ROWS ? m - i : ROWS, width = rows <= LANES ? LANES : ROWS;
        for (int p = 0; p < k; p++) {
            float *to = turned + (long)i * k + (long)p * width;
            for (int r = 0; r < width; r++)
                to[r] = r < rows ? x[(i + r) * ldx + p] : 0;
        }
    }
    return turned != 0;
}

/* numbers first to last of c (n) = alpha w x + beta c: one row has no columns to fill a vector, so
   that vectors go along x (k) and along the rows of w (n, k), COLUMNS of them at a time */
static inline __attribute__((always_inline))
void dots(int columns, int k, float alpha, const float *x, const float *w, long ldw, float beta, float *c) {
    vector sums[COLUMNS];
    int p = 0;
    for (int j = 0; j < columns; j++)
        sums[j] = (vector){0};
    for (; p + LANES <= k; p += LANES)
        for (int j = 0; j < columns; j++) {
            __builtin_prefetch(w + (j + columns) * ldw + p);
            sums[j] += *(const anywhere *)(x + p) * *(const anywhere *)(w + j * ldw + p);
        }
    for (int j = 0; j < columns; j++) {
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++)
            sum += sums[j][lane];
        for (int rest = p; rest < k; rest++)
            sum += x[rest] * w[j * ldw + rest];
        c[j] = beta == 0 ? alpha * sum : alpha * sum + beta * c[j];
    }
}

static void some_dots(int first, int last, int k, float alpha, const float *x,
                      const float *w, long ldw, float beta, float *c) {
    int j = first;
    for (; j + COLUMNS <= last; j += COLUMNS)
        dots(COLUMNS, k, alpha, x, w + j * ldw, ldw, beta, c + j);
    for (; j < last; j++)
        dots(1, k, alpha, x, w + j * ldw, ldw, beta, c + j);
}

/* c (m, n) = alpha a (m, k) b (k, n) + beta c; a transposed matrix is stored as (k, m) or (n, k) */
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    long work = (long)m * n * k;
    int ours = order == ROW_MAJOR && trans_a == AS_IS && trans_b == TRANSPOSED &&
               (m == 1 || (m <= MOST && k >= DEEP && work >= WORTH));
    if (!ours || (m > 1 && !turn(m, k, a, lda))) {
        gemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    int parts = work < ALONE ? 1 : count_threads();
    const float *x = m == 1 ? a : turned;       /* `turned` of this thread, for all */
#pragma omp parallel for num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; part++) {
        int first = (long)n * part / parts / COLUMNS * COLUMNS;
        int next = (long)n * (part + 1) / parts / COLUMNS * COLUMNS;
        int last = part + 1 == parts ? n : next;
        if (m == 1)
            some_dots(first, last, k, alpha, x, b, ldb, beta, c);
        else
            some_columns(first, last, m, k, alpha, x, b, ldb, beta, c, ldc);
    }
}
