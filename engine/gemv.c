/* A product of one row, as gemv: stands in front of OpenBLAS's cblas_sgemm, which MLX calls.

   OpenBLAS copies the whole matrix into panels before it multiplies. For many rows that pays; for
   one it takes two to three times as long as reading the matrix once, which is all that gemv does.
   setup.sh compiles this file; blas.py loads it before OpenBLAS and hands it both functions. */

enum { ROW_MAJOR = 101, AS_IS = 111, TRANSPOSED = 112 };    /* cblas.h's numbers */

typedef void (*gemm_t)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                       const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
typedef void (*gemv_t)(int order, int trans, int rows, int columns, float alpha,
                       const float *matrix, int ld, const float *x, int incx, float beta, float *y, int incy);

static gemm_t gemm;
static gemv_t gemv;

void use_functions(gemm_t openblas_gemm, gemv_t openblas_gemv) {
    gemm = openblas_gemm;
    gemv = openblas_gemv;
}

/* c (m, n) = alpha a (m, k) b (k, n) + beta c; a transposed matrix is stored as (k, m) or (n, k) */
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    if (order != ROW_MAJOR || m != 1 || k == 0) {
        gemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    int step = trans_a == TRANSPOSED ? lda : 1;     /* from one number of the row to the next */
    if (beta == 0)                                  /* c is not set yet: gemv might read a NaN there */
        for (int i = 0; i < n; i++)
            c[i] = 0;
    if (trans_b == TRANSPOSED)
        gemv(ROW_MAJOR, AS_IS, n, k, alpha, b, ldb, a, step, beta, c, 1);
    else
        gemv(ROW_MAJOR, TRANSPOSED, k, n, alpha, b, ldb, a, step, beta, c, 1);
}
