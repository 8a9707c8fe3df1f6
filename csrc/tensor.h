// What the operators share: types of tensors, loops over threads, and the arguments' memory.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "memory.h"
#include "simd.h"

namespace normwise {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <class T>
constexpr ScalarType kType = ScalarType::Float;
template <>
constexpr ScalarType kType<double> = ScalarType::Double;
template <>
constexpr ScalarType kType<BFloat16> = ScalarType::BFloat16;
template <>
constexpr ScalarType kType<Half> = ScalarType::Half;

template <class T>
constexpr double largest() {
  return std::is_same_v<T, double>     ? 1.7976931348623157e308
         : std::is_same_v<T, Half>     ? 65504
         : std::is_same_v<T, BFloat16> ? 0x1.fep127
                                       : 0x1.fffffep127;
}

template <class T>
inline const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
inline const T* data(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <class T>
inline T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The type of t; scalar_type() asks the library for the number of every type that comes before it, one call each.
inline ScalarType type_of(const Tensor& t) {
  static const int32_t kFloat = aoti_torch_dtype_float32();
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return type == kFloat ? ScalarType::Float : t.scalar_type();
}

// Call f with a value of the type that x holds.
template <class F>
inline auto with_type(const Tensor& x, const F& f) {
  const ScalarType type = type_of(x);
  switch (type) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(type == ScalarType::Float, "normwise: a tensor must be float64, float32, bfloat16 or float16.");
      return f(float{});
  }
}

// The operators check what keeps them within their arguments' memory, before they allocate anything. Python, which has
// the sentences, is asked for one only where a call fails: its checks take longer than a small norm.
inline void check_input(const Tensor& x, double eps) {
  with_type(x, [](auto) {});
  STD_TORCH_CHECK(eps >= 0 && eps <= largest<double>(), "normwise: eps must be 0 or more and finite; got ", eps, ".");
}
inline void check_parameter(Sizes shape, const Tensor& parameter) {
  with_type(parameter, [](auto) {});
  STD_TORCH_CHECK(parameter.sizes() == shape && parameter.is_cpu(),
                  "normwise: a parameter must have the shape of what it scales or shifts, on the CPU.");
}
inline void check_parameter(Sizes shape, const MaybeTensor& parameter) {
  if (parameter) check_parameter(shape, *parameter);
}

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    default:
      return 2;
  }
}

// True if the elements fill a block of memory without gaps, in any order of the axes.
inline bool is_dense(const Tensor& t) {
  if (t.numel() && t.is_contiguous()) return true;
  int64_t expected = 1;
  for (int64_t found = 0; found < t.dim(); ++found) {
    int64_t i = 0;
    while (i < t.dim() && (t.size(i) == 1 || t.stride(i) != expected)) ++i;
    if (i == t.dim()) break;
    expected *= t.size(i);
  }
  return expected == t.numel();
}

inline Tensor poisoned(Tensor t) {
  if (Memory::instance().poisoned() && t.numel())
    std::memset(t.mutable_data_ptr(), 0xff, size_t(t.numel() * bytes_of(type_of(t))));
  return t;
}

// Uninitialized memory on the CPU, without the microsecond that the dispatcher takes.
inline Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType type) {
  AtenTensorHandle handle;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return poisoned(Tensor(handle));
}
inline Tensor empty(Sizes sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return empty_strided(sizes, strides, type);
}

// What torch.empty_like gives, in memory that is reused where it is large.
inline Tensor fresh_like(const Tensor& t) {
  if (!is_dense(t)) return torch::stable::empty_like(t);  // which then has other strides
  const ScalarType type = type_of(t);
  const int64_t bytes = t.numel() * bytes_of(type);
  if (bytes < Memory::kSmallest || !Memory::instance().limit()) return empty_strided(t.sizes(), t.strides(), type);
  void* data = Memory::instance().take(bytes);
  try {
    return poisoned(torch::stable::from_blob(data, t.sizes(), t.strides(), t.device(), type,
                                             [](void* p) { Memory::instance().give(p); }));
  } catch (...) {
    Memory::instance().give(data);
    throw;
  }
}

inline Tensor copy_with(const Tensor& t, Sizes strides) {
  Tensor r = empty_strided(t.sizes(), strides, t.scalar_type());
  torch::stable::copy_(r, t);
  return r;
}

// t in the order of memory that x has.
inline Tensor in_order_of(const Tensor& x, const Tensor& t) {
  if (t.is_contiguous() && x.is_contiguous()) return t;
  const auto a = t.strides(), b = x.strides();
  if (std::equal(a.begin(), a.end(), b.begin(), b.end())) return t;
  Tensor r = fresh_like(x);
  torch::stable::copy_(r, t);
  return r;
}

// A parameter, packed and in the type that the kernel computes with: as it is, while the argument lives, or copied.
template <class A>
class Parameter {
 public:
  explicit Parameter(const MaybeTensor& given) {
    if (!given) return;
    if (!given->is_contiguous()) packed_ = torch::stable::contiguous(*given);
    const Tensor& t = packed_ ? *packed_ : *given;
    if (type_of(t) == kType<A>) {
      data_ = normwise::data<A>(t);
      return;
    }
    copy_.resize(t.numel());
    data_ = copy_.data();
    with_type(t, [&](auto tag) {
      using P = decltype(tag);
      constexpr int L = Vec<Wide<P>>::lanes;
      const P* const from = normwise::data<P>(t);
      A* const to = copy_.data();
      each_vector<L>(int64_t(copy_.size()), [=](int64_t i, auto m) NORMWISE_INLINE {
        Wide<P> lane[L];
        store(lane, load_up_to(from + i, m));
        for (int k = 0; k < m; ++k) to[i + k] = A(lane[k]);
      });
    });
  }
  // null if there is none.
  const A* data() const { return data_; }

 private:
  MaybeTensor packed_;
  std::vector<A> copy_;
  const A* data_ = nullptr;
};

// The result, laid out in memory like the input that was copied to compute it.
inline Tensor laid_out(const Tensor& result, const Tensor& input, bool copied) {
  if (!copied) return result;
  Tensor r = fresh_like(input);
  torch::stable::copy_(r, result);
  return r;
}

// t in another type: what is narrower than the output is widened first, without loss, and the output rounded once.
inline Tensor widened(const Tensor& t, std::optional<ScalarType> type) {
  return !type || *type == type_of(t) ? t : torch::stable::to(t, *type);
}

// The type to compute in for an output of this type, and the output from there.
inline ScalarType computed(const Tensor& x, std::optional<ScalarType> out) {
  const ScalarType from = type_of(x), t = out.value_or(from);
  return t == from || t == ScalarType::Double ? t : ScalarType::Float;
}

// What stands for a gradient that is not wanted.
inline Tensor nothing(const Tensor& like) { return empty({0}, type_of(like)); }

// After a bare fork OpenMP's threads are gone and waiting for them hangs: the child runs alone.
inline bool& forked() {
  static bool is_child = false;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked() = true; });
  (void)registered;
  return is_child;
}

constexpr int64_t kGrain = 32768;  // values a thread should have to be worth waking

template <class F>
inline void parallel(int64_t n, int64_t values_each, const F& f) {
  if (n == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values_each));
  if (n <= grain || forked())
    f(0, n);
  else
    torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace normwise
