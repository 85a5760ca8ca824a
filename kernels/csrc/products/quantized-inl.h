// Chooses between the paths for few and for many tokens.

template <Format F>
void matmul_quantized(const MatmulArgs& a) {
  using T = Traits<F>;
  const int64_t scratch = T::block == 256 ? a.n * (a.cols / 256) * kFusedScratch<F> : 0;
  if (a.n > a.few || scratch > kMatmulScratch) return KTD_MATMUL_MANY<F>(a);
  const auto run = [&]<int kTokens>() {
    MatmulArgs rest = a;
    if constexpr (kByColumns<F>) {
      const int64_t taken = multiply_columns<F, kTokens>(a);
      rest.w += taken * a.row_bytes;
      rest.rows -= taken;
      rest.out += taken;
    }
    if constexpr (T::block == 256)
      fused_256<F, kTokens>(rest, 0);
    else
      fused_32<F, kTokens>(rest, 0);
  };
  if (a.n == 1)
    run.template operator()<1>();
  else if (a.n == 2)
    run.template operator()<2>();
  else if (a.n == 3)
    run.template operator()<3>();
  else if (a.n == 4)
    run.template operator()<4>();
}
