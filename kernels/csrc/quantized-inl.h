// Chooses between the paths for few and for many tokens.

template <Format F>
void matmul_quantized(const MatmulArgs& a) {
  using T = Traits<F>;
  const int64_t scratch = T::block == 256 ? a.n * (a.cols / 256) * kFusedScratch<F> : 0;
  if (a.n > a.few || scratch > kMatmulScratch) return KTD_MATMUL_MANY<F>(a);
  const auto run = [&]<int kTokens>() {
    if constexpr (T::block == 256)
      fused_256<F, kTokens>(a, 0);
    else
      fused_32<F, kTokens>(a, 0);
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
