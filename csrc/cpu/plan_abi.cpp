// C ABI of the planner, called through ctypes by ttskernels/kv/plan.py.
#include "ttskernels/plan_build.h"

namespace {

ttsk::Planner& ThisThreadsPlanner() {
  thread_local ttsk::Planner planner;
  return planner;
}

}  // namespace

extern "C" {

// Computes a plan into scratch of this thread. sizes: {rows, items, segs, merges, slots, unique tokens, flat tokens};
// us: {modelled, flat}.
__attribute__((visibility("default"))) void ttsk_plan_compute(const int32_t* spec, const double* costs, int64_t* sizes,
                                                              double* us) {
  ttsk::Planner& planner = ThisThreadsPlanner();
  planner.Build(ttsk::TreeSpec(spec), *reinterpret_cast<const ttsk::PlanCosts*>(costs));
  sizes[0] = planner.rows();
  sizes[1] = planner.items();
  sizes[2] = planner.segs();
  sizes[3] = planner.merges();
  sizes[4] = planner.slots();
  sizes[5] = planner.unique_tokens();
  sizes[6] = planner.flat_tokens();
  us[0] = planner.modelled_us();
  us[1] = planner.flat_us();
}

// Writes the plan that this thread computed last to a buffer whose header holds capacities and section offsets.
__attribute__((visibility("default"))) void ttsk_plan_write(int32_t* plan) { ThisThreadsPlanner().Write(plan); }

__attribute__((visibility("default"))) int32_t ttsk_plan_advance(int32_t* plan) { return ttsk::PlanAdvance(plan); }

__attribute__((visibility("default"))) int64_t ttsk_tree_from_block_tables(const int32_t* table, const int32_t* lens,
                                                                           const int32_t* queries, int32_t count,
                                                                           int32_t width, int32_t page_size,
                                                                           int32_t* packed) {
  return ttsk::TreeFromBlockTables(table, lens, queries, count, width, page_size, packed);
}

}  // extern "C"
