#include "ttskernels/decoder.h"

#include <algorithm>
#include <cstring>

#include "element.h"
#include "ttskernels/linear.h"
#include "ttskernels/plan.h"
#include "ttskernels/refine_logits.h"
#include "ttskernels/rms_norm.h"
#include "ttskernels/rope_append.h"
#include "ttskernels/threads.h"
#include "ttskernels/tree_attention.h"

namespace ttsk {
namespace {

void RowAsFloat(const char* table, int64_t row, int64_t dim, DType dtype, float* out) {
  const char* source = table + row * dim * SizeOf(dtype);
  if (dtype == DType::kFloat32) {
    std::memcpy(out, source, dim * 4);
    return;
  }
  for (int64_t i = 0; i < dim; ++i) out[i] = ElementAsFloat(source, i, dtype);
}

Bytes Copy(const void* data, int64_t count, DType dtype) {
  if (data == nullptr) return {};
  const char* bytes = static_cast<const char*>(data);
  return Bytes(bytes, bytes + count * SizeOf(dtype));
}

// `to` is `dtype` or float32.
Bytes CopyAs(const void* data, int64_t count, DType dtype, DType to) {
  if (to == dtype) return Copy(data, count, dtype);
  Bytes wide(count * 4);
  for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(wide.data())[i] = ElementAsFloat(data, i, dtype);
  return wide;
}

void AppendBias(std::vector<float>& bias, const void* part, int64_t n, DType dtype, bool any) {
  if (!any) return;
  for (int64_t i = 0; i < n; ++i) bias.push_back(part != nullptr ? ElementAsFloat(part, i, dtype) : 0.0f);
}

// Columns of q, so that k and v begin at a panel of their own and can be computed alone.
int64_t WholePanels(int64_t q) { return (q + kPanelColumns - 1) / kPanelColumns * kPanelColumns; }

enum ScratchIndex : int { kX, kNormed, kQkv, kQ, kAttended, kAct, kOutX, kWorkspace, kAttention, kLogits,
                        kRope, kCount };

}  // namespace

Decoder::Decoder(const DecoderShape& shape, const float* inv_freq, const void* embed, const void* final_norm,
                 const Matrix& lm_head, const void* head_rows, const std::vector<LayerWeights>& layers)
    : shape_(shape), inv_freq_(inv_freq, inv_freq + shape.head_dim / 2), head_rows_(head_rows), scratch_(kCount) {
  const DType t = shape.dtype;
  const int64_t h = shape.hidden, inner = shape.intermediate;
  const int64_t q = shape.q_heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim, wide_q = WholePanels(q);
  const auto pack = [&](int64_t n, int64_t k, LinearForm form) { return Bytes(LinearPackedBytes(n, k, t, form), 0); };
  const auto whole = [](int64_t first, int64_t n) { return PackColumns{first, n, 0}; };
  const auto put = [&](const Matrix& w, int64_t n, int64_t k, const PackColumns& columns, void* to, LinearForm form) {
    if (w.scales == nullptr) LinearPack(w.values, n, k, k, t, columns, to, form);
    else LinearPackRounded(static_cast<const int8_t*>(w.values), w.scales, n, k, columns, to);
  };
  embed_ = Copy(embed, shape.vocab * h, t);
  final_norm_ = CopyAs(final_norm, h, t, InnerType(shape.form));
  if (lm_head.values != nullptr) {
    lm_head_ = pack(shape.vocab, h, shape.form);
    put(lm_head, shape.vocab, h, whole(0, shape.vocab), lm_head_.data(), shape.form);
  }
  for (const LayerWeights& w : layers) {
    Layer layer;
    layer.input_norm = CopyAs(w.input_norm, h, t, InnerType(shape.form));
    layer.post_norm = CopyAs(w.post_norm, h, t, InnerType(shape.form));
    layer.q_norm = Copy(w.q_norm, shape.head_dim, t), layer.k_norm = Copy(w.k_norm, shape.head_dim, t);
    const int64_t q_bytes = LinearPackedBytes(wide_q, h, t, shape.form);
    layer.qkv = Bytes(q_bytes + LinearPackedBytes(2 * kv, h, t, shape.kv_form), 0);
    put(w.q, q, h, whole(0, q), layer.qkv.data(), shape.form);
    put(w.k, kv, h, whole(0, kv), layer.qkv.data() + q_bytes, shape.kv_form);
    put(w.v, kv, h, whole(kv, kv), layer.qkv.data() + q_bytes, shape.kv_form);
    const bool biased = w.q_bias != nullptr || w.k_bias != nullptr || w.v_bias != nullptr;
    AppendBias(layer.qkv_bias, w.q_bias, q, t, biased);
    layer.qkv_bias.resize(biased ? wide_q : 0);
    AppendBias(layer.qkv_bias, w.k_bias, kv, t, biased);
    AppendBias(layer.qkv_bias, w.v_bias, kv, t, biased);
    layer.o = pack(h, q, shape.form);
    put(w.o, h, q, whole(0, h), layer.o.data(), shape.form);
    AppendBias(layer.o_bias, w.o_bias, h, t, w.o_bias != nullptr);
    // Panels of 32 gate and 32 up columns (kSwiGlu); an intermediate size that is no multiple of 32 is padded with zeros.
    const int64_t padded = (inner + 31) / 32 * 32;
    layer.gate_up = pack(2 * padded, h, shape.form);
    put(w.gate, inner, h, {0, 32, 64}, layer.gate_up.data(), shape.form);
    put(w.up, inner, h, {32, 32, 64}, layer.gate_up.data(), shape.form);
    // `down` reads the padded activations: its extra columns are zero.
    layer.down = pack(h, padded, shape.down_form);
    Matrix down = w.down;  // rounded: whole groups, so padded already
    Bytes wide(down.scales == nullptr ? h * padded * SizeOf(t) : 0, 0);
    for (int64_t r = 0; down.scales == nullptr && r < h; ++r) {
      std::memcpy(wide.data() + r * padded * SizeOf(t), static_cast<const char*>(w.down.values) + r * inner * SizeOf(t),
                  inner * SizeOf(t));
    }
    if (down.scales == nullptr) down.values = wide.data();
    put(down, h, padded, whole(0, h), layer.down.data(), shape.down_form);
    layers_.push_back(std::move(layer));
  }
  shape_.intermediate = (inner + 31) / 32 * 32;
}

int64_t Decoder::weight_bytes() const {
  int64_t total = embed_.size() + final_norm_.size() + lm_head_.size();
  for (const Layer& l : layers_) {
    for (const Bytes* b : {&l.input_norm, &l.qkv, &l.q_norm, &l.k_norm, &l.o, &l.post_norm, &l.gate_up, &l.down}) {
      total += b->size();
    }
    total += 4 * (l.qkv_bias.size() + l.o_bias.size());
  }
  return total;
}

int64_t Decoder::scratch_bytes() const {
  int64_t total = 0;
  for (const Bytes& b : scratch_) total += b.size();
  return total;
}

template <typename T>
T* Decoder::Scratch(int index, int64_t count) {
  Bytes& buffer = scratch_[index];
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  if (buffer.size() < bytes) buffer = Bytes(bytes + bytes / 4);
  return reinterpret_cast<T*>(buffer.data());
}

void Decoder::Norm(const float* x, const Bytes& weight, int64_t rows, void* y) const {
  const int64_t h = shape_.hidden;
  TTSK_SELECT(RmsNorm)({x, weight.data(), y, rows, h, h, h, shape_.rms_eps, DType::kFloat32, InnerType(shape_.form)});
}

void Decoder::Project(const void* x, DType x_dtype, const Bytes& packed, const std::vector<float>& bias, int64_t rows,
                      int64_t n, int64_t k, bool add, void* y, DType y_dtype, bool swiglu, LinearForm form) {
  LinearParams p{};
  p.x = x, p.packed = packed.data(), p.bias = bias.empty() ? nullptr : bias.data(), p.y = y;
  p.workspace = Scratch<char>(kWorkspace, LinearWorkspaceBytes(rows, k));
  p.rows = rows, p.n = n, p.k = k, p.x_stride = k, p.y_stride = swiglu ? n / 2 : n;
  p.x_dtype = x_dtype, p.weight_dtype = shape_.dtype, p.y_dtype = y_dtype;
  p.epilogue = swiglu ? LinearEpilogue::kSwiGlu : add ? LinearEpilogue::kAdd : LinearEpilogue::kStore;
  p.form = form;
  TTSK_SELECT(Linear)(p);
}

void Decoder::Forward(const KvPools& pools, const int32_t* plan, const int32_t* ids, int64_t rows,
                      const int32_t* out_plan, const int32_t* out_rows, int64_t num_out, DecoderOutput output,
                      float* out) {
  if (rows == 0 || layers_.empty()) return;
  const DecoderShape& s = shape_;
  const DType inner = InnerType(s.form), gated = InnerType(s.down_form), heads = pools.form == KvForm::kFloat ? s.dtype : inner;
  const int64_t h = s.hidden;
  const int64_t q = s.q_heads * s.head_dim, kv = s.kv_heads * s.head_dim;
  const int64_t wide_q = WholePanels(q), qkv_dim = wide_q + 2 * kv, most = std::max(rows, num_out);
  float* x = Scratch<float>(kX, rows * h);
  char* normed = Scratch<char>(kNormed, most * h * SizeOf(inner));
  float* qkv = Scratch<float>(kQkv, most * qkv_dim);
  char* rotated = Scratch<char>(kQ, most * q * SizeOf(heads));
  char* attended = Scratch<char>(kAttended, most * q * SizeOf(heads));
  char* act = Scratch<char>(kAct, most * s.intermediate * SizeOf(gated));
  const std::vector<float> no_bias;

  const int64_t pairs = s.head_dim / 2;
  float* cos_sin = Scratch<float>(kRope, 2 * most * pairs);
  RopeTable(PlanSection(plan, kFieldRowPos), rows, inv_freq_.data(), pairs, s.rope_scale, cos_sin);
  for (int64_t r = 0; r < rows; ++r) RowAsFloat(embed_.data(), ids[r], h, s.dtype, x + r * h);

  int64_t live = rows;  // rows whose queries run; the K, V of all rows are written in every layer
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    char* k_pages = static_cast<char*>(pools.k) + l * pools.k_layer_bytes;
    char* v_pages = static_cast<char*>(pools.v) + l * pools.v_layer_bytes;
    const auto project = [&](int64_t first, int64_t n, LinearForm form) {  // columns of q, k, v, from q or from k on
      LinearParams p{};
      p.x = normed, p.packed = layer.qkv.data() + LinearPackedBytes(first, h, s.dtype, s.form), p.y = qkv + first;
      p.bias = layer.qkv_bias.empty() ? nullptr : layer.qkv_bias.data() + first;
      p.workspace = Scratch<char>(kWorkspace, LinearWorkspaceBytes(live, h));
      p.rows = live, p.n = n, p.k = h, p.x_stride = h, p.y_stride = qkv_dim;
      p.x_dtype = inner, p.weight_dtype = s.dtype, p.y_dtype = DType::kFloat32, p.epilogue = LinearEpilogue::kStore;
      p.form = form;
      TTSK_SELECT(Linear)(p);
    };
    const auto rope = [&](int64_t q_heads, int64_t kv_heads) {
      RopeAppendParams p{};
      p.q_in = qkv, p.k_in = qkv + wide_q, p.v_in = qkv + wide_q + kv, p.q_out = rotated;
      p.k_pages = k_pages, p.v_pages = v_pages, p.packed = true, p.form = pools.form, p.page_size = 16;
      p.slots = PlanSection(plan, kFieldRowSlot), p.cos_sin = cos_sin, p.eps = s.rms_eps;
      p.q_norm = layer.q_norm.empty() ? nullptr : layer.q_norm.data();
      p.k_norm = layer.k_norm.empty() ? nullptr : layer.k_norm.data();
      p.rows = live, p.q_heads = q_heads, p.kv_heads = kv_heads;
      p.head_dim = p.v_dim = s.head_dim, p.pairs = pairs;
      p.q_in_stride = p.k_in_stride = p.v_in_stride = qkv_dim, p.q_out_stride = q;
      p.in_dtype = DType::kFloat32, p.dtype = heads, p.norm_dtype = s.dtype;
      TTSK_SELECT(RopeAppend)(p);
    };
    Norm(x, layer.input_norm, live, normed);
    if (l + 1 < layers_.size() || out_plan == nullptr) {
      const bool alike = s.kv_form == s.form;
      project(0, alike ? qkv_dim : wide_q, s.form);
      if (!alike) project(wide_q, 2 * kv, s.kv_form);
      rope(s.q_heads, s.kv_heads);
    } else {  // nothing reads the other rows any more
      project(wide_q, 2 * kv, s.kv_form);
      rope(0, s.kv_heads);
      float* out_x = Scratch<float>(kOutX, num_out * h);
      for (int64_t i = 0; i < num_out; ++i) std::memcpy(out_x + i * h, x + out_rows[i] * h, h * 4);
      x = out_x, live = num_out, plan = out_plan;
      RopeTable(PlanSection(plan, kFieldRowPos), live, inv_freq_.data(), pairs, s.rope_scale, cos_sin);
      Norm(x, layer.input_norm, live, normed);
      project(0, wide_q, s.form);
      rope(s.q_heads, 0);
    }

    TreeAttentionParams attention{};
    attention.q = rotated, attention.out = attended, attention.k = k_pages, attention.v = v_pages;
    attention.plan = plan, attention.rows = live, attention.q_heads = s.q_heads, attention.kv_heads = s.kv_heads;
    attention.head_dim = attention.v_dim = s.head_dim, attention.q_stride = attention.out_stride = q;
    attention.dtype = heads, attention.packed = true, attention.scale = s.scale, attention.softcap = s.softcap;
    attention.form = pools.form, attention.window = static_cast<int32_t>(s.window);
    attention.workspace = Scratch<char>(kAttention, TreeAttentionWorkspaceBytes(attention));
    TTSK_SELECT(TreeAttention)(attention);

    Project(attended, heads, layer.o, layer.o_bias, live, h, q, true, x, DType::kFloat32, false, s.form);
    Norm(x, layer.post_norm, live, normed);
    Project(normed, inner, layer.gate_up, no_bias, live, 2 * s.intermediate, h, false, act, gated, true, s.form);
    Project(act, gated, layer.down, no_bias, live, h, s.intermediate, true, x, DType::kFloat32, false, s.down_form);
  }
  if (output == DecoderOutput::kHidden) {
    std::memcpy(out, x, num_out * h * 4);
    return;
  }
  Norm(x, final_norm_, num_out, normed);
  Project(normed, inner, lm_head_, no_bias, num_out, s.vocab, h, false, out, DType::kFloat32, false, s.form);
  if (head_rows_ == nullptr) return;
  TTSK_SELECT(RefineLogits)({out, reinterpret_cast<const float*>(normed), head_rows_, num_out, s.vocab, h, s.dtype});
}

DecodeStop Decoder::Decode(const KvPools& pools, const DecodeParams& p, int64_t* iterations, int64_t* bad_row) {
  *iterations = 0;
  float* logits = Scratch<float>(kLogits, p.rows * shape_.vocab);
  while (*iterations < p.max_iterations) {
    if (*iterations > 0 && PlanAdvance(p.plan) != 0) return DecodeStop::kOutOfSlots;
    Forward(pools, p.plan, p.ids, p.rows, nullptr, nullptr, p.rows, DecoderOutput::kLogits, logits);
    int32_t* tokens = p.tokens + *iterations * p.rows;
    SampleParams sample{};
    sample.logits = logits, sample.keys = p.keys, sample.positions = PlanSection(p.plan, kFieldRowPos);
    sample.options = p.options, sample.tokens = tokens, sample.logprobs = p.logprobs + *iterations * p.rows;
    sample.count = p.rows, sample.vocab = shape_.vocab, sample.logits_stride = shape_.vocab;
    sample.position_offset = 1;  // the token being sampled stands one behind the row
    *bad_row = Sample(sample);
    if (*bad_row >= 0) return DecodeStop::kBadLogits;
    ++*iterations;
    bool ended = false;
    for (int64_t r = 0; r < p.rows; ++r) {
      p.ids[r] = tokens[r];
      p.states[r] = p.next_state[p.states[r] * shape_.vocab + tokens[r]];
      ended |= p.states[r] < 0;
      if (p.states[r] >= p.num_states) {
        *bad_row = r;
        return DecodeStop::kBadState;
      }
    }
    if (ended) return DecodeStop::kRowEnded;
  }
  return DecodeStop::kFull;
}

}  // namespace ttsk
