// Memory of large outputs. Fresh memory costs more than the arithmetic: the kernel clears every page at its first
// touch. Blocks that a tensor has released are kept, up to a limit, and given to the next output of about their size.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

namespace normwise {

class Memory {
 public:
  static constexpr int64_t kSmallest = 1 << 20;  // bytes; below, the allocator reuses its memory itself

  // One for the process, never destroyed: tensors may outlive every static object.
  static Memory& instance() {
    static Memory& memory = *new Memory;
    return memory;
  }

  void* take(int64_t bytes) {
    const int64_t size = rounded(bytes);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = free_.size(); i-- > 0;) {  // the last one released may still be in the cache
        const Block block = free_[i];
        if (block.size < size || block.size > size + size / 4) continue;
        free_.erase(free_.begin() + int64_t(i));
        held_ -= block.size;
        used_[block.data] = block.size;
        return block.data;
      }
    }
    void* data = nullptr;
    if (posix_memalign(&data, size_t(size >= kHuge ? kHuge : 4096), size_t(size))) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (size >= kHuge) madvise(data, size_t(size), MADV_HUGEPAGE);
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    used_[data] = size;
    return data;
  }

  void give(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = used_.find(data);
    free_.push_back({data, at->second});
    held_ += at->second;
    used_.erase(at);
    trim();
  }

  int64_t held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }
  int64_t limit() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return limit_;
  }
  // Fill what a kernel is to write with NaN first, so that a test sees what it forgot.
  bool poisoned() const { return poisoned_; }
  void set_poisoned(bool on) { poisoned_ = on; }

  void set_limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    trim();
  }

 private:
  static constexpr int64_t kHuge = 2 << 20;

  struct Block {
    void* data;
    int64_t size;
  };

  Memory() {
    // A child of a fork must not find the mutex held by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  // To a multiple of an eighth of its power of two, so that sizes that are nearly equal share blocks.
  static int64_t rounded(int64_t bytes) {
    int64_t step = kSmallest / 8;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  void trim() {
    size_t gone = 0;
    for (; held_ > limit_; ++gone) {
      std::free(free_[gone].data);
      held_ -= free_[gone].size;
    }
    free_.erase(free_.begin(), free_.begin() + int64_t(gone));
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // the last one released stands last
  std::unordered_map<void*, int64_t> used_;
  int64_t held_ = 0, limit_ = 512 << 20;
  std::atomic<bool> poisoned_ = false;
};

// For the arrays that a call needs for itself, which would else be fresh memory in every call; left uninitialized.
template <class T>
struct Reused {
  using value_type = T;
  static constexpr size_t kSmallest = 1 << 15;  // bytes

  Reused() = default;
  template <class U>
  Reused(const Reused<U>&) {}
  T* allocate(size_t n) {
    const size_t bytes = n * sizeof(T);
    return static_cast<T*>(bytes < kSmallest ? ::operator new(bytes) : Memory::instance().take(int64_t(bytes)));
  }
  void deallocate(T* p, size_t n) { n * sizeof(T) < kSmallest ? ::operator delete(p) : Memory::instance().give(p); }
  template <class U>
  void construct(U* p) {
    ::new (p) U;
  }
  template <class U, class... Args>
  void construct(U* p, Args&&... args) {
    ::new (p) U(std::forward<Args>(args)...);
  }
  bool operator==(const Reused&) const { return true; }
};

template <class T>
using Array = std::vector<T, Reused<T>>;

}  // namespace normwise
