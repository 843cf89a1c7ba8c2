// Memory of weights and scratch: 64-byte aligned, big blocks on huge pages. Torch-free.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ttsk {

// Unaligned weights make every vector load cross a cache line, and 4 KiB pages make streaming them miss the TLB.
template <typename T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <typename U>
  AlignedAllocator(const AlignedAllocator<U>&) {}

  T* allocate(size_t n) {
    const size_t bytes = n * sizeof(T), page = bytes >= (size_t{4} << 20) ? size_t{2} << 20 : 64;
    const size_t rounded = (bytes + page - 1) / page * page;
    void* p = std::aligned_alloc(page, rounded);
    if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (page > 64) madvise(p, rounded, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t) { std::free(p); }
  bool operator==(const AlignedAllocator&) const { return true; }
};

using Bytes = std::vector<char, AlignedAllocator<char>>;

}  // namespace ttsk
