// Which formats an instruction set packs: specialised by the packed_*-inl.h that it includes.
template <Format F>
constexpr PackedKernels kPackedKernels{};
