// One configured decoder: pre-norm, grouped-query attention with rotary positions, SwiGLU. Torch-free.
// Llama 1-3.x, SmolLM2, Mistral, Qwen2 / 2.5 (biases) and Qwen3 (q/k norm) differ by configuration only.
#pragma once

#include <cstdint>
#include <vector>

#include "ttskernels/decoder_memory.h"
#include "ttskernels/dtype.h"
#include "ttskernels/kv_form.h"
#include "ttskernels/linear.h"
#include "ttskernels/sample.h"

namespace ttsk {

struct DecoderShape {
  int64_t vocab, hidden, layers, q_heads, kv_heads, head_dim, intermediate, window;  // window 0: none
  DType dtype;
  LinearForm form, kv_form, down_form;  // of the packed matrices; of k and v; of down
  float rms_eps, rope_scale, scale, softcap;
};

// A matrix as the checkpoint has it, row-major, of the decoder's dtype; or, with scales, rounded already (LinearPackRounded).
struct Matrix {
  const void* values = nullptr;
  const float* scales = nullptr;
};

// Null where the family has none.
struct LayerWeights {
  const void *input_norm, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *o_bias, *post_norm;
  Matrix q, k, v, o, gate, up, down;
};

// KV of all layers, packed layout, page_size 16; layer l begins `*_layer_bytes * l` bytes in.
struct KvPools {
  void *k, *v;
  int64_t k_layer_bytes, v_layer_bytes;
  KvForm form;
};

enum class DecoderOutput : int { kHidden = 0, kLogits = 1 };

// Why Decode returned. Iterations that are done have their tokens, log-probabilities and states written.
enum class DecodeStop : int { kRowEnded, kFull, kOutOfSlots, kBadLogits, kBadState };

struct DecodeParams {
  int32_t* plan;                // advanced between iterations
  int32_t* ids;                 // [rows] in: token whose KV is appended next; out: last sampled token
  const int64_t* keys;          // [rows]
  const SampleOptions* options; // [rows]
  const int32_t* next_state;    // [states, vocab]
  int32_t* states;              // [rows] in, out
  int32_t* tokens;              // [max_iterations, rows]
  float* logprobs;              // [max_iterations, rows]
  int64_t rows, max_iterations, num_states;
};

class Decoder {
 public:
  // Copies every weight (matrices packed); the caller's memory may go away, but for head_rows: the vocabulary head as it is,
  // with which an int8 one is refined, or null. lm_head: no values for a model without one; tied embeddings pass the embedding.
  // inv_freq: [head_dim / 2].
  Decoder(const DecoderShape& shape, const float* inv_freq, const void* embed, const void* final_norm,
          const Matrix& lm_head, const void* head_rows, const std::vector<LayerWeights>& layers);

  const DecoderShape& shape() const { return shape_; }
  bool has_lm_head() const { return !lm_head_.empty(); }
  int64_t weight_bytes() const;
  int64_t scratch_bytes() const;  // grows with the rows of a call, with the vocabulary in Decode only

  // Runs the plan's rows; row r's token is ids[r] (checked by the caller to lie in the vocabulary). Writes K, V of rows
  // with a slot, all of a layer before its attention, and out[i] = hidden state before the final norm [hidden] or
  // logits [vocab] of row out_rows[i]. out_plan: a plan of rows out_rows alone, which are all that the last layer's
  // queries, attention and MLP run for; or null: out_rows are all rows, in order. Not reentrant.
  void Forward(const KvPools& pools, const int32_t* plan, const int32_t* ids, int64_t rows, const int32_t* out_plan,
               const int32_t* out_rows, int64_t num_out, DecoderOutput output, float* out);

  // Iterations of forward, sample, next_state for all rows until one of them needs the caller. See DecodeStop; with
  // kBadLogits, bad_row is the first row whose logits are not finite; with kBadState, the first that next_state sends to a
  // state it does not have.
  DecodeStop Decode(const KvPools& pools, const DecodeParams& p, int64_t* iterations, int64_t* bad_row);

 private:
  struct Layer {
    Bytes input_norm, qkv, q_norm, k_norm, o, post_norm, gate_up, down;
    std::vector<float> qkv_bias, o_bias;
  };
  template <typename T>
  T* Scratch(int index, int64_t count);
  // What linears of a form read: fixed-point ones round it themselves.
  DType InnerType(LinearForm form) const { return form == LinearForm::kFloat ? shape_.dtype : DType::kFloat32; }
  void Norm(const float* x, const Bytes& weight, int64_t rows, void* y) const;
  void Project(const void* x, DType x_dtype, const Bytes& packed, const std::vector<float>& bias, int64_t rows, int64_t n,
               int64_t k, bool add, void* y, DType y_dtype, bool swiglu, LinearForm form);

  DecoderShape shape_;
  std::vector<float> inv_freq_;
  Bytes embed_, final_norm_, lm_head_;
  const void* head_rows_;  // [vocab, hidden] of the dtype, not owned
  std::vector<Layer> layers_;
  std::vector<Bytes> scratch_;
};

}  // namespace ttsk
