// Computes what its standard input asks for with the kernels of the instruction set named as its argument, so
// that tests can run the kernels of a processor that is only emulated (kit_arm.py).
//
// A request is int64 numbers: the op, a count and so many arguments, a count and so many arrays, each as its
// bytes' number and its bytes. The answer is the last array after the op, in the same form.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

#include "products/cpu.h"
#include "isa/dispatch.h"
#include "formats/formats.h"
#include "products/matmul.h"
#include "products/moe.h"
#include "ops/ops_attention.h"
#include "ops/ops_rows.h"
#include "ops/ops_sample.h"

namespace ktd {
namespace {

enum Op : int64_t { kProduct, kMoe, kAttention, kRmsNorm, kRope, kStore, kDequantize, kDraw, kScore };

struct Array {
  Buffer buffer;
  int64_t bytes = 0;

  template <class T>
  T* get() {
    return buffer.get<T>(bytes / static_cast<int64_t>(sizeof(T)));
  }
};

struct Request {
  int64_t op;
  std::vector<int64_t> n;
  std::vector<Array> arrays;

  float* floats(size_t i) { return arrays[i].get<float>(); }
  int32_t* ints(size_t i) { return arrays[i].get<int32_t>(); }
};

bool read_bytes(void* to, int64_t bytes) {
  return fread(to, 1, static_cast<size_t>(bytes), stdin) == static_cast<size_t>(bytes);
}

int64_t read_number() {
  int64_t number = 0;
  if (!read_bytes(&number, sizeof number)) exit(feof(stdin) ? 0 : 1);
  return number;
}

Request read_request() {
  Request request{read_number(), {}, {}};
  request.n.resize(static_cast<size_t>(read_number()));
  for (int64_t& number : request.n) number = read_number();
  request.arrays = std::vector<Array>(static_cast<size_t>(read_number()));
  for (Array& array : request.arrays) {
    array.bytes = read_number();
    if (!read_bytes(array.buffer.get<uint8_t>(array.bytes), array.bytes)) exit(1);
  }
  return request;
}

Weight weight(Array& array, int64_t ggml_type, int64_t count, int64_t rows, int64_t cols) {
  Weight w{};
  const FormatInfo* info = find_format(static_cast<int>(ggml_type), &w.format);
  if (info == nullptr) exit(1);
  w.data = array.get<uint8_t>();
  w.count = count;
  w.rows = rows;
  w.cols = cols;
  w.row_bytes = cols / info->block * info->bytes;
  if (array.bytes != w.nbytes()) exit(1);
  return w;
}

// type, rows, cols, n, few, accumulate; w, x, out. One call, on this thread.
void product(Cpu& cpu, Request& r) {
  const Weight w = weight(r.arrays[0], r.n[0], 1, r.n[1], r.n[2]);
  const int64_t n = r.n[3], block = w.activation_block();
  MatmulArgs args{};
  args.w = w.data;
  args.row_bytes = w.row_bytes;
  args.rows = w.rows;
  args.cols = w.cols;
  args.x_float = r.floats(1);
  args.x_float_stride = w.cols;
  if (block != 0) args.x = quantize(cpu, cpu.x, block, {r.floats(1), w.cols}, n, 1, w.cols);
  args.n = n;
  args.out = r.floats(2);
  args.out_stride = w.rows;
  args.accumulate = r.n[5] != 0;
  args.few = static_cast<int>(r.n[4]);
  args.scratch = cpu.scratch();
  matmul_of(cpu, w)(args);
}

// Three types, experts, hidden, width, n, k; gate, up, down, x, ids, weights, out.
void mixture(Cpu& cpu, Request& r) {
  const int64_t experts = r.n[3], hidden = r.n[4], width = r.n[5];
  const Weight gate = weight(r.arrays[0], r.n[0], experts, hidden, width),
               up = weight(r.arrays[1], r.n[1], experts, hidden, width),
               down = weight(r.arrays[2], r.n[2], experts, width, hidden);
  MoeArgs args{};
  args.gate = &gate;
  args.up = &up;
  args.down = &down;
  args.x = {r.floats(3), width};
  args.n = r.n[6];
  args.k = args.here = r.n[7];
  args.ids = r.ints(4);
  args.weights = r.floats(5);
  args.out = {r.floats(6), width};
  moe(cpu, args);
}

// bf16, page size, pages of a sequence, n, heads, r, dr; latent and rope queries, cache, page table, sequence
// and context of the rows, scale, out.
void attention(Cpu& cpu, Request& r) {
  Attention a{};
  a.bf16 = r.n[0] != 0;
  a.page_size = r.n[1];
  a.page_table_row = r.n[2];
  a.heads = r.n[4];
  a.r = r.n[5];
  a.dr = r.n[6];
  a.q_latent = r.floats(0);
  a.q_latent_head = a.r;
  a.q_latent_row = a.heads * a.r;
  a.q_rope = r.floats(1);
  a.q_rope_head = a.dr;
  a.q_rope_row = a.heads * a.dr;
  a.cache = r.arrays[2].get<uint8_t>();
  a.page_table = r.ints(3);
  a.seq_of_row = r.ints(4);
  a.context = r.ints(5);
  a.scale = *r.floats(6);
  a.out = r.floats(7);
  mla_attention(cpu, a, r.n[3]);
}

void compute(Cpu& cpu, Request& r) {
  switch (r.op) {
    case kProduct:
      return product(cpu, r);
    case kMoe:
      return mixture(cpu, r);
    case kAttention:
      return attention(cpu, r);
    case kRmsNorm:  // n, d; x, weight, eps, out
      return rms_norm(cpu, r.floats(0), r.n[1], r.floats(1), *r.floats(2), r.n[0], r.n[1], r.floats(3),
                      r.n[1]);
    case kRope:  // n, heads, dr; positions, table, x
      return rope(cpu, {r.floats(2), r.n[1] * r.n[2], r.n[2], r.n[1], r.n[2], r.ints(0), r.floats(1)},
                  r.n[0]);
    case kStore:  // n, width; latent, slots, cache of bfloat16
      return store_latent(cpu, {r.floats(0), r.n[1], r.n[1], r.arrays[1].get<int64_t>(), r.floats(2), true},
                          r.n[0]);
    case kDequantize: {  // type, rows, cols; w, out
      const Weight w = weight(r.arrays[0], r.n[0], 1, r.n[1], r.n[2]);
      for (int64_t i = 0; i < w.rows; ++i) w.dequantize(0, i, r.floats(1) + i * w.cols);
      return;
    }
    case kDraw:  // n, vocab; logits, numbers of rows, rules, tokens
      return draw(cpu, {r.floats(0), r.n[1], r.n[1], r.ints(1), r.n[0]}, r.arrays[2].get<DrawRule>(),
                  r.ints(3));
    case kScore:  // n, vocab, count; logits, numbers of rows, ids, totals
      return score(cpu, {r.floats(0), r.n[1], r.n[1], r.ints(1), r.n[0]}, r.n[2], r.arrays[3].get<double>(),
                   r.ints(2));
  }
  exit(1);
}

}  // namespace
}  // namespace ktd

// Without an argument: what the processor has.
int main(int count, char** arguments) {
  using namespace ktd;
  if (count < 2) {
    for (const std::string& name : isa_list()) printf("%s ", name.c_str());
    printf("\n");
    for (const std::string& name : cpu_features()) printf("%s ", name.c_str());
    printf("\n");
    return 0;
  }
  Cpu cpu(3, {}, kernel_table(arguments[1]));
  for (;;) {
    Request request = read_request();
    compute(cpu, request);
    Array& answer = request.arrays.back();
    fwrite(&answer.bytes, sizeof answer.bytes, 1, stdout);
    fwrite(answer.get<uint8_t>(), 1, static_cast<size_t>(answer.bytes), stdout);
    fflush(stdout);
  }
}
