#include "ttskernels/decoder.h"

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#endif

#include "check_plan.h"
#include "rounded.h"
#include "tensor.h"

namespace ttsk {
namespace {

// Handles of live decoders. A decoder is not reentrant: one call at a time each, from any thread.
struct Entry {
  std::optional<Tensor> head_rows;  // the decoder reads them
  std::unique_ptr<Decoder> decoder;
  std::unique_ptr<std::mutex> running = std::make_unique<std::mutex>();
};
std::mutex registry_mutex;
std::map<int64_t, std::shared_ptr<Entry>> registry;
int64_t next_handle = 1;

#if defined(__linux__)
// A forked child has none of the threads that were inside a decoder: nobody would ever unlock it there.
const int at_fork = pthread_atfork([] { registry_mutex.lock(); }, [] { registry_mutex.unlock(); }, [] {
  for (auto& [handle, entry] : registry) {
    entry->running.release();  // destroying a locked mutex is undefined
    entry->running = std::make_unique<std::mutex>();
  }
  registry_mutex.unlock();
});
#endif

std::shared_ptr<Entry> Find(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry.find(handle);
  STD_TORCH_CHECK(found != registry.end(), "decoder handle ", handle, " is unknown or was freed");
  return found->second;
}

constexpr int kConfigInts = 12, kConstants = 4, kLayerWeights = 22, kModelWeights = 5;  // a matrix: values, scales

int64_t CreateOp(std::vector<int64_t> config, std::vector<double> constants, const Tensor& inv_freq,
                 std::vector<std::optional<Tensor>> weights) {
  STD_TORCH_CHECK(config.size() == kConfigInts && constants.size() == kConstants, "config needs ", kConfigInts,
                  " integers and ", kConstants, " constants, got ", config.size(), " and ", constants.size());
  for (int i = 0; i < 7; ++i) STD_TORCH_CHECK(config[i] > 0, "config[", i, "] must be positive, got ", config[i]);
  STD_TORCH_CHECK(config[3] % config[4] == 0 && config[5] % 16 == 0 && config[5] <= 256 && config[7] >= 0,
                  "config needs q_heads a multiple of kv_heads, head_dim a multiple of 16 up to 256 and window >= 0, got ",
                  config[3], ", ", config[4], ", ", config[5], ", ", config[7]);
  for (int i = 8; i < kConfigInts; ++i) {  // dtype, forms
    STD_TORCH_CHECK(config[i] >= 0 && config[i] <= 2, "config[", i, "] must be 0..2, got ", config[i]);
  }
  DecoderShape s{};
  s.vocab = config[0], s.hidden = config[1], s.layers = config[2], s.q_heads = config[3], s.kv_heads = config[4];
  s.head_dim = config[5], s.intermediate = config[6], s.window = config[7], s.dtype = static_cast<DType>(config[8]);
  s.form = static_cast<LinearForm>(config[9]), s.kv_form = static_cast<LinearForm>(config[10]);
  s.down_form = static_cast<LinearForm>(config[11]);
  s.rms_eps = static_cast<float>(constants[0]), s.rope_scale = static_cast<float>(constants[1]);
  s.scale = static_cast<float>(constants[2]), s.softcap = static_cast<float>(constants[3]);
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == kModelWeights + kLayerWeights * s.layers, "weights must be ",
                  kModelWeights, " + ", kLayerWeights, " per layer, got ", weights.size(), " for ", s.layers, " layers");
  STD_TORCH_CHECK(inv_freq.scalar_type() == ScalarType::Float && inv_freq.is_contiguous() &&
                      inv_freq.numel() == s.head_dim / 2,
                  "inv_freq must be float32 [head_dim / 2 = ", s.head_dim / 2, "]");
  const int64_t q = s.q_heads * s.head_dim, kv = s.kv_heads * s.head_dim, h = s.hidden, m = s.intermediate;
  const auto get = [&](size_t i, std::vector<int64_t> shape, bool required) -> const void* {
    if (!weights[i].has_value()) {
      STD_TORCH_CHECK(!required, "weight ", i, " is missing");
      return nullptr;
    }
    const Tensor& w = *weights[i];
    bool fits = w.is_contiguous() && DTypeOf(w) == s.dtype && w.dim() == static_cast<int64_t>(shape.size());
    for (int64_t d = 0; fits && d < w.dim(); ++d) fits = w.size(d) == shape[d];
    STD_TORCH_CHECK(fits, "weight ", i, " must be contiguous, of the decoder's dtype and shape [", shape[0],
                    shape.size() > 1 ? ", " : "", shape.size() > 1 ? std::to_string(shape[1]) : "", "], got ", w.dim(),
                    " dimensions, ", w.numel(), " elements");
    return w.data_ptr();
  };
  const auto matrix = [&](size_t i, int64_t n, int64_t k, LinearForm form, bool required) -> Matrix {
    if (!weights[i + 1].has_value()) return {get(i, {n, k}, required), nullptr};
    STD_TORCH_CHECK(form == LinearForm::kInt8 && weights[i].has_value(), "weight ", i, " has scales, but is no int8 matrix");
    const RoundedPointers rounded = CheckRounded(*weights[i], *weights[i + 1], n, k);
    return {rounded.values, rounded.scales};
  };
  const void* embed = get(0, {s.vocab, h}, true);
  const void* final_norm = get(1, {h}, true);
  const Matrix lm_head = matrix(2, s.vocab, h, s.form, false);
  const void* head_rows = get(4, {s.vocab, h}, false);
  STD_TORCH_CHECK(head_rows == nullptr || (s.form == LinearForm::kInt8 && lm_head.values != nullptr),
                  "weight 4 refines the logits of an int8 vocabulary head, and there is none");
  std::vector<LayerWeights> layers;
  for (int64_t l = 0; l < s.layers; ++l) {
    size_t i = kModelWeights + kLayerWeights * l;
    LayerWeights w{};
    w.input_norm = get(i++, {h}, true);
    const auto next = [&](int64_t n, int64_t k, LinearForm form) { return i += 2, matrix(i - 2, n, k, form, true); };
    w.q = next(q, h, s.form), w.q_bias = get(i++, {q}, false);
    w.k = next(kv, h, s.kv_form), w.k_bias = get(i++, {kv}, false);
    w.v = next(kv, h, s.kv_form), w.v_bias = get(i++, {kv}, false);
    w.q_norm = get(i++, {s.head_dim}, false), w.k_norm = get(i++, {s.head_dim}, false);
    w.o = next(h, q, s.form), w.o_bias = get(i++, {h}, false);
    w.post_norm = get(i++, {h}, true);
    w.gate = next(m, h, s.form), w.up = next(m, h, s.form), w.down = next(h, m, s.down_form);
    layers.push_back(w);
  }
  auto entry = std::make_shared<Entry>();
  entry->head_rows = weights[4];
  entry->decoder = std::make_unique<Decoder>(s, Data<const float>(inv_freq), embed, final_norm, lm_head, head_rows, layers);
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry[next_handle] = entry;
  return next_handle++;
}

KvPools CheckPools(const DecoderShape& s, const Tensor& k, const Tensor& v) {
  const KvForm form = KvFormOf(k);
  if (form != KvForm::kFloat) {
    const int64_t run = FixedRun(s.head_dim, form);
    STD_TORCH_CHECK(v.scalar_type() == k.scalar_type() && k.dim() == 4 && v.dim() == 4 && k.is_contiguous() &&
                        v.is_contiguous() && k.size(0) == s.layers && v.size(0) == s.layers && k.size(1) == v.size(1) &&
                        k.size(2) == s.kv_heads && v.size(2) == s.kv_heads && k.size(3) == run && v.size(3) == run,
                    "pools must be contiguous fixed-point pools of this model (model.new_pool)");
    const int64_t layer_bytes = k.numel() / s.layers * IntegerBytes(form);
    return {k.mutable_data_ptr(), v.mutable_data_ptr(), layer_bytes, layer_bytes, form};
  }
  const int64_t f = PackFactor(s.dtype);
  STD_TORCH_CHECK(DTypeOf(k) == s.dtype && DTypeOf(v) == s.dtype, "pools must have the decoder's dtype");
  STD_TORCH_CHECK(k.dim() == 6 && v.dim() == 6 && k.is_contiguous() && v.is_contiguous() && k.size(0) == s.layers &&
                      v.size(0) == s.layers && k.size(1) == v.size(1) && k.size(2) == s.kv_heads &&
                      v.size(2) == s.kv_heads && k.size(3) * f == s.head_dim && k.size(4) == 16 && k.size(5) == f &&
                      v.size(3) * f == 16 && v.size(4) == s.head_dim && v.size(5) == f,
                  "pools must be contiguous packed pools of this model (model.new_pool)");
  const int64_t layer_bytes = k.numel() / s.layers * SizeOf(s.dtype);
  return {k.mutable_data_ptr(), v.mutable_data_ptr(), layer_bytes, layer_bytes, form};
}

// ids in the vocabulary, slots inside the pool: nothing is read or written out of bounds.
void CheckRows(const DecoderShape& s, const Tensor& plan, const Tensor& ids, int64_t pages) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int && ids.dim() == 1 && ids.is_contiguous(), "ids must be int32 [rows]");
  CheckPlan(plan, ids.numel(), 16, pages);
  const int32_t* p = Data<const int32_t>(plan);
  const int32_t* slots = PlanSection(p, kFieldRowSlot);
  const int32_t* id = Data<const int32_t>(ids);
  for (int64_t r = 0; r < ids.numel(); ++r) {
    STD_TORCH_CHECK(id[r] >= 0 && id[r] < s.vocab, "ids[", r, "] must lie in 0 .. ", s.vocab - 1, ", got ", id[r]);
    STD_TORCH_CHECK(slots[r] >= -1 && slots[r] < pages * 16, "plan row ", r, " writes to slot ", slots[r], " of ", pages * 16);
  }
}

Tensor ForwardOp(int64_t handle, const Tensor& k_pool, const Tensor& v_pool, const Tensor& plan, const Tensor& ids,
                 const Tensor& out_rows, int64_t output, int64_t width, const std::optional<Tensor>& out_plan) {
  const std::shared_ptr<Entry> entry = Find(handle);
  Decoder& decoder = *entry->decoder;
  const DecoderShape& s = decoder.shape();
  const KvPools pools = CheckPools(s, k_pool, v_pool);
  CheckRows(s, plan, ids, k_pool.size(1));
  STD_TORCH_CHECK(output == 0 || (output == 1 && decoder.has_lm_head()), "output must be 0 (hidden) or, with a vocabulary "
                  "head, 1 (logits), got ", output);
  STD_TORCH_CHECK(width == (output == 1 ? s.vocab : s.hidden), "width must be the vocabulary for logits, the hidden size "
                  "for hidden, got ", width);
  STD_TORCH_CHECK(out_rows.scalar_type() == ScalarType::Int && out_rows.dim() == 1 && out_rows.is_contiguous(),
                  "out_rows must be int32 [n]");
  const int32_t* wanted = Data<const int32_t>(out_rows);
  if (out_plan) CheckPlan(*out_plan, out_rows.numel(), 16, k_pool.size(1));
  for (int64_t i = 0; i < out_rows.numel(); ++i) {
    STD_TORCH_CHECK(wanted[i] >= 0 && wanted[i] < ids.numel(), "out_rows[", i, "] must lie in 0 .. ", ids.numel() - 1,
                    ", got ", wanted[i]);
    STD_TORCH_CHECK(out_plan || (wanted[i] == i && out_rows.numel() == ids.numel()), "out_rows must be all rows in order "
                    "without an out_plan");
  }
  Tensor out = torch::stable::new_empty(k_pool, {out_rows.numel(), width}, ScalarType::Float);
  std::lock_guard<std::mutex> lock(*entry->running);
  decoder.Forward(pools, Data<const int32_t>(plan), Data<const int32_t>(ids), ids.numel(),
                  out_plan ? Data<const int32_t>(*out_plan) : nullptr, wanted, out_rows.numel(),
                  static_cast<DecoderOutput>(output), Data<float>(out));
  return out;
}

Tensor DecodeOp(int64_t handle, const Tensor& k_pool, const Tensor& v_pool, const Tensor& plan, const Tensor& ids,
                 const Tensor& keys, const Tensor& params, const Tensor& next_state, const Tensor& states,
                 const Tensor& tokens, const Tensor& logprobs) {
  const std::shared_ptr<Entry> entry = Find(handle);
  Decoder& decoder = *entry->decoder;
  const DecoderShape& s = decoder.shape();
  STD_TORCH_CHECK(decoder.has_lm_head(), "decode needs a vocabulary head; this checkpoint has none");
  const KvPools pools = CheckPools(s, k_pool, v_pool);
  CheckRows(s, plan, ids, k_pool.size(1));
  const int64_t rows = ids.numel();
  const auto check = [&](const Tensor& t, const char* name, ScalarType type, int64_t count) {
    STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == count, name, " must be contiguous with ",
                    count, " elements of the documented dtype, got ", t.numel());
  };
  STD_TORCH_CHECK(tokens.dim() == 2 && next_state.dim() == 2, "tokens and next_state must be two-dimensional");
  check(keys, "keys", ScalarType::Long, rows), check(params, "params", ScalarType::Float, rows * 4);
  check(next_state, "next_state", ScalarType::Int, next_state.size(0) * s.vocab);
  check(states, "states", ScalarType::Int, rows), check(tokens, "tokens", ScalarType::Int, tokens.size(0) * rows);
  check(logprobs, "logprobs", ScalarType::Float, tokens.size(0) * rows);
  const int32_t* state = Data<const int32_t>(states);
  const SampleOptions* options = reinterpret_cast<const SampleOptions*>(Data<const float>(params));
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(state[r] >= 0 && state[r] < next_state.size(0), "states[", r, "] must lie in 0 .. ",
                    next_state.size(0) - 1, ", got ", state[r]);
    STD_TORCH_CHECK(ValidOptions(options[r]), "params[", r, "] must be temperature >= 0, top_k >= 0, 0 < top_p <= 1, "
                    "0 <= min_p <= 1");
  }
  DecodeParams p{};
  p.plan = Data<int32_t>(plan), p.ids = Data<int32_t>(ids), p.keys = Data<const int64_t>(keys), p.options = options;
  p.next_state = Data<const int32_t>(next_state), p.num_states = next_state.size(0);
  p.states = Data<int32_t>(states), p.tokens = Data<int32_t>(tokens);
  p.logprobs = Data<float>(logprobs), p.rows = rows, p.max_iterations = tokens.size(0);
  int64_t iterations = 0, bad_row = -1;
  DecodeStop stop;
  {
    std::lock_guard<std::mutex> lock(*entry->running);
    stop = decoder.Decode(pools, p, &iterations, &bad_row);
  }
  STD_TORCH_CHECK(stop != DecodeStop::kBadState, "next_state leads to state ", bad_row < 0 ? 0 : state[bad_row], ", it has ",
                  next_state.size(0), " states");
  STD_TORCH_CHECK(stop != DecodeStop::kBadLogits, "logits of row ", bad_row, " are not finite after ", iterations,
                  " iterations; the weights or the KV cache are damaged");
  Tensor done = torch::stable::new_empty(ids, {}, ScalarType::Int);
  *Data<int32_t>(done) = static_cast<int32_t>(iterations);
  return done;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) {
  m.impl("decoder_create", TORCH_BOX(&CreateOp));
  m.impl("decoder_forward", TORCH_BOX(&ForwardOp));
  m.impl("decoder_decode", TORCH_BOX(&DecodeOp));
}

}  // namespace ttsk

// bytes: {weights, scratch} of a decoder; zeros for an unknown handle.
extern "C" __attribute__((visibility("default"))) void ttsk_decoder_memory(int64_t handle, int64_t* bytes) {
  std::lock_guard<std::mutex> lock(ttsk::registry_mutex);
  const auto found = ttsk::registry.find(handle);
  const ttsk::Decoder* decoder = found == ttsk::registry.end() ? nullptr : found->second->decoder.get();
  bytes[0] = decoder != nullptr ? decoder->weight_bytes() : 0;
  bytes[1] = decoder != nullptr ? decoder->scratch_bytes() : 0;
}

// Forgets a decoder; unknown handles are ignored (a finaliser may run twice at interpreter exit).
extern "C" __attribute__((visibility("default"))) void ttsk_decoder_free(int64_t handle) {
  std::shared_ptr<ttsk::Entry> last;  // freed outside the lock
  std::lock_guard<std::mutex> lock(ttsk::registry_mutex);
  const auto found = ttsk::registry.find(handle);
  if (found == ttsk::registry.end()) return;
  last = found->second;
  ttsk::registry.erase(found);
}
