/* Products of few rows, fast: stands in front of OpenBLAS's cblas_sgemm, which MLX calls.

   Decoding multiplies a few rows x by a matrix W of many, x W^T. OpenBLAS copies all of W into
   panels first, which pays from some 64 rows on. Here W is read once, where it lies, and the small
   x is transposed instead (`transposed`), so that a vector holds one column of it:

       for every number w of W:   sums of W's row += w * (x's column, LANES rows at a time)

   One row alone is multiplied by each row of W. All other products go to OpenBLAS.
   setup.sh compiles this file for each kind of processor; blas.py loads it before OpenBLAS. */
#include <stdlib.h>

enum { ROW_MAJOR = 101, AS_IS = 111, TRANSPOSED = 112 };    /* cblas.h's numbers */

/* a tile is COLUMNS columns of c, each from one row of W, by VECTORS vectors of c's rows, a lane for
   each row of x. Its sums stay in registers: 16 of 32 (AVX-512), which keep both multipliers busy;
   12 of 16 (AVX2); 24 of 32 (NEON) */
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
    /* for two rows and more: numbers of a row, of fewer putting away the sums costs too much; and
       multiplications, fewer are left to OpenBLAS */
    DEEP = 128, WORTH = 1 << 18,
    ALONE = 1 << 16,            /* multiplications; fewer are not worth a thread of their own */
    LONG = 384,                 /* products in one sum, which then goes to the totals: see tile() */
    LINE = 16                   /* numbers of a cache line */
};
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4)));     /* in memory */

typedef void (*gemm_t)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                       const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
static gemm_t gemm;
static int (*count_threads)(void);
/* x, as tile() reads it, kept from call to call; one for each of MLX's streams, which may multiply at once */
static __thread float *transposed;
static __thread size_t room;

/* blas.py calls this before MLX can see cblas_sgemm. Whoever changes its arguments renames it: a
   library compiled before would take the new ones for the old */
void put_few_rows_before(gemm_t openblas_gemm, int (*openblas_get_num_threads)(void)) {
    gemm = openblas_gemm;
    count_threads = openblas_get_num_threads;
}

/* c (rows, columns) = alpha x w^T + beta c: x transposed, (k, vectors * LANES); w (columns, k), of which
   each row gives a column of c. Only where vectors and columns are constants are sums registers */
static inline __attribute__((always_inline))
void tile(int vectors, int columns, int rows, int k, float alpha, const float *x,
          const float *w, long ldw, float beta, float *c, long ldc) {
    vector totals[COLUMNS][VECTORS] = {0};
    for (int p = 0; p < k;) {
        /* a sum of sums: one long float32 sum of 1,536 numbers would round twice as much */
        int end = k - p < LONG ? k : p + LONG;
        vector sums[COLUMNS][VECTORS];
        for (int j = 0; j < columns; j++)
            for (int v = 0; v < vectors; v++)
                sums[j][v] = (vector){0};
        for (; p < end; p++) {
            if (p % LINE == 0)  /* the next tile's w, which a processor does not guess. Behind the last
                                   one nothing is there: a prefetch may ask for that, a read may not */
                for (int j = 0; j < columns; j++)
                    __builtin_prefetch(w + (j + columns) * ldw + p);
            const vector *column = (const vector *)x + (long)p * vectors;
            for (int j = 0; j < columns; j++)
                for (int v = 0; v < vectors; v++)
                    sums[j][v] += w[j * ldw + p] * column[v];
        }
        for (int j = 0; j < columns; j++)
            for (int v = 0; v < vectors; v++)
                totals[j][v] += sums[j][v];
    }
    for (int j = 0; j < columns; j++)
        for (int i = 0; i < rows; i++) {
            float *to = c + i * ldc + j;
            float sum = alpha * totals[j][i / LANES][i % LANES];
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
            /* at i * k: the rows before these are all in groups of ROWS */
#define TILE(V, C) tile(V, C, rows, k, alpha, x + (long)i * k, w + j * ldw, ldw, beta, c + i * ldc + j, ldc)
            if (columns == 1 && vectors == 1) TILE(1, 1);
            else if (columns == 1) TILE(VECTORS, 1);
            else if (vectors == 1) TILE(1, COLUMNS);
            else TILE(VECTORS, COLUMNS);
        }
    }
}

/* x (m, k) to `transposed`: (k, width) for each ROWS rows, the rows beyond m being 0 */
static int transpose(int m, int k, const float *x, long ldx) {
    size_t needed = 4 * (size_t)(m + ROWS) * k;
    if (needed > room) {
        free(transposed);
        transposed = aligned_alloc(64, (needed + 63) / 64 * 64);
        room = transposed ? needed : 0;
    }
    for (int i = 0; i < m && transposed; i += ROWS) {
        int rows = m - i < ROWS ? m - i : ROWS, width = rows <= LANES ? LANES : ROWS;
        for (int p = 0; p < k; p++) {
            float *to = transposed + (long)i * k + (long)p * width;
            for (int r = 0; r < width; r++)
                to[r] = r < rows ? x[(i + r) * ldx + p] : 0;
        }
    }
    return transposed != 0;
}

/* c (columns) = alpha w x + beta c of one row x (k), whose columns are single numbers: vectors go
   along x and along the rows of w (columns, k) */
static inline __attribute__((always_inline))
void dots(int columns, int k, float alpha, const float *x, const float *w, long ldw, float beta, float *c) {
    vector sums[COLUMNS];
    int p = 0;
    for (int j = 0; j < columns; j++)
        sums[j] = (vector){0};
    for (; p + LANES <= k; p += LANES)
        for (int j = 0; j < columns; j++) {
            if (p % LINE == 0)
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

/* numbers first to last of c (n) */
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
    /* even for one row of few numbers OpenBLAS copies all of b */
    int ours = order == ROW_MAJOR && trans_a == AS_IS && trans_b == TRANSPOSED &&
               (m == 1 || (m <= MOST && k >= DEEP && work >= WORTH));
    if (!ours || (m > 1 && !transpose(m, k, a, lda))) {
        gemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    long most = 1 + work / ALONE, parts = count_threads();
    if (parts > most)
        parts = most;
    const float *x = m == 1 ? a : transposed;   /* before the threads part: `transposed` is each one's own */
#pragma omp parallel for num_threads(parts) if (parts > 1)
    for (long part = 0; part < parts; part++) {
        /* borders between tiles: single columns, which are slower, only at the end */
        int first = n * part / parts / COLUMNS * COLUMNS;
        int next = n * (part + 1) / parts / COLUMNS * COLUMNS;
        int last = part + 1 == parts ? n : next;
        if (m == 1)
            some_dots(first, last, k, alpha, x, b, ldb, beta, c);
        else
            some_columns(first, last, m, k, alpha, x, b, ldb, beta, c, ldc);
    }
}
