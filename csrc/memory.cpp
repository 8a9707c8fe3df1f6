// What Python sees of the memory of large outputs.
#include "memory.h"

#define NORMWISE_EXPORT extern "C" __attribute__((visibility("default")))

NORMWISE_EXPORT int64_t normwise_memory_held() { return normwise::Memory::instance().held(); }
NORMWISE_EXPORT int64_t normwise_memory_limit() { return normwise::Memory::instance().limit(); }
NORMWISE_EXPORT void normwise_set_memory_limit(int64_t bytes) { normwise::Memory::instance().set_limit(bytes); }
NORMWISE_EXPORT void normwise_set_memory_poisoned(bool on) { normwise::Memory::instance().set_poisoned(on); }
