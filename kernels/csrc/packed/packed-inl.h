// Which formats an instruction set packs: specialised by the packed_*-inl.h that it includes.
template <Format F>
constexpr PackedKernels kPackedKernels{};

// A block of 16 rows of a packed format.
template <Format F>
struct PackedBlock;
