/* A product of one row, as gemv: put in front of OpenBLAS's cblas_sgemm, which MLX calls for all.

   OpenBLAS copies the whole matrix into panels before it multiplies. For many rows that pays; for
   one it takes three times as long as reading the matrix once, which is all that gemv does.
   setup.sh compiles this file; blas.py loads it before OpenBLAS and hands it both functions. */

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

/* c (m, n) = alpha a (m, k) b (k, n) + beta c, each row by row (101) or as its transpose (112) */
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    if (order != 101 || m != 1)
        gemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    else if (trans_b == 112)    /* b is stored (n, k): each number of c is the product of two rows */
        gemv(101, 111, n, k, alpha, b, ldb, a, trans_a == 112 ? lda : 1, beta, c, 1);
    else
        gemv(101, 112, k, n, alpha, b, ldb, a, trans_a == 112 ? lda : 1, beta, c, 1);
}
