// batch_norm: every channel has its own statistics, over all samples, or those that it is given.
#include "channels.h"

namespace normwise {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// A channel's values as the loops walk them. Over rows without positions, samples are positions of one.
Channels channels_of(const Tensor& x, bool by_sample) {
  Channels in(x);
  View& v = in.view;
  if (v.interleaved && !by_sample) v = {std::min<int64_t>(v.n, 1), v.c, v.n * v.s, true, true};
  return in;
}

// The order-free sums of one channel: of x and of its square, about zero, and the number of values. What several
// processes or parts of a batch hold is merged by adding them, integer by integer.
constexpr int kMoments = 2 * kSlots + 1;

void add_exactly(const ByChannel<Part>& parts, int64_t first, int64_t last, int64_t* to) {
  const int64_t width = last - first;
  Terms sums(to, width, kMoments), squares(to + kSlots, width, kMoments);
  parts.each_row([&](const Part* row) {
    double sum[kMerged] = {}, square[kMerged] = {}, sum_lo[kMerged] = {}, square_lo[kMerged] = {};
    bool anchored = false;
    for (int64_t c = 0; c < width; ++c) {
      const Part& p = row[first + c];
      to[c * kMoments + 2 * kSlots] += int64_t(p.count);
      sum[c] = p.sum, square[c] = p.squares;
      if (p.anchor == 0) continue;
      if (p.count == 1) {
        const Pair product = two_product(p.anchor, p.anchor);
        sum[c] = p.anchor, square[c] = product.hi, square_lo[c] = product.lo;
        anchored = anchored || product.lo != 0;
        continue;
      }
      anchored = true;
      const Pair all = two_product(p.count, p.anchor) + Pair{p.sum, 0};
      const Pair about_zero =
          two_product(p.anchor, p.anchor) * p.count + two_product(2 * p.anchor, p.sum) + Pair{p.squares, 0};
      sum[c] = all.hi, sum_lo[c] = all.lo, square[c] = about_zero.hi, square_lo[c] = about_zero.lo;
    }
    sums.add(sum), squares.add(square);
    if (anchored) sums.add(sum_lo), squares.add(square_lo);
  });
}

void moments_of(const int64_t* sums, double& mean, double& var) {
  const double count = double(std::max<int64_t>(sums[2 * kSlots], 1));
  const Pair total = value_of(sums), average = total / count, product = total * average;
  const Pair m2 = value_of(sums + kSlots) + Pair{-product.hi, -product.lo};
  mean = average.hi;
  var = m2.hi < 0 ? 0 : m2.hi / count;
}

// Doubles may lie off the grid of the exact sums; those of floats never do.
bool on_grid(const int64_t* sums, bool is_float) {
  return !sums[kDigits] && !sums[kSlots + kDigits] && (is_float || value_of(sums + kSlots).hi > 0x1p-240);
}

// Whether the grid's lowest digit is rounding beside these sums.
template <class T>
bool above_grid(const GradientSums& all) {
  return sizeof(Wide<T>) == 4 || (std::fabs(all.dy) > 0x1p-240 && std::fabs(all.dyc) > 0x1p-240);
}

// The sums of dy and of dy * (x - mean) * unit, with lo * unit what the mean has beside hi; with `to`, as order-free
// sums too.
void add_gradients(const ByChannel<GradientSums>& parts, int64_t first, int64_t last, const double* lo,
                   GradientSums* all, int64_t* to) {
  const int64_t width = to ? last - first : 0;
  Terms dy(to, width, 2 * kSlots), dyc(to + kSlots, width, 2 * kSlots);
  parts.each_row([&](const GradientSums* row) {
    double one[kMerged] = {}, two[kMerged] = {};
    for (int64_t c = first; c < last; ++c) {
      const GradientSums centred{row[c].dy, row[c].dyc - row[c].dy * lo[c - first]};
      all[c - first] += centred;
      one[c - first] = centred.dy, two[c - first] = centred.dyc;
    }
    if (to) dy.add(one), dyc.add(two);
  });
}

template <class T>
Statistics<T> statistics(double mean, double var, double eps) {
  return {mean, 1 / std::sqrt(var + eps), var};
}

template <class F>
void each_channel(const View& v, const F& f) {
  parallel(v.c, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c);
  });
}

// y = c * scale + offset for every channel, plus a residual, without what is negative.
template <class T>
Tensor transformed(const Channels& in, const Tensor& input, const Affine<T>& a, const Mask& mask,
                   const MaybeTensor& residual, bool relu) {
  const View& v = in.view;
  const MaybeTensor added = in.in_order(residual);
  Tensor y = fresh_like(in.x);
  const Forward<T> transform{data<T>(in.x), out<T>(y), data<T>(added), relu};
  parallel(lines_of(v), 3 * length_of(v), [&](int64_t begin, int64_t end) { transform(v, a, mask, begin, end); });
  return laid_out(y, input, in.copied);
}

// xhat * weight + bias
template <class T>
void set_forward(Affine<T>& a, int64_t c, const Statistics<T>& of, const double* weight, const double* bias) {
  a.forward(c, of, of.rstd * at(weight, c, 1), at(bias, c, 0));
}

Tensor eval(const Tensor& x, const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& weight,
            const MaybeTensor& bias, double eps, const MaybeTensor& mask, const MaybeTensor& residual, bool relu) {
  check_channels(x, eps, weight, bias, mask);
  check_parameter(x.sizes().slice(1, 1), running_mean);
  check_parameter(x.sizes().slice(1, 1), running_var);
  const Channels in = channels_of(x, false);
  const Parameter<double> mean(running_mean), var(running_var), w(weight), b(bias);
  return with_type(x, [&](auto tag) {
    using T = decltype(tag);
    Affine<T> a(in.view, true);
    each_channel(in.view, [&](int64_t c) {
      set_forward(a, c, statistics<T>(mean.data()[c], var.data()[c], eps), w.data(), b.data());
    });
    return transformed(in, x, a, Mask(mask, in.view), residual, relu);
  });
}

Three forward(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps, const MaybeTensor& mask,
              const MaybeTensor& residual, bool relu, bool reproducible) {
  const Channels in = channels_of(x, reproducible);
  const View& v = in.view;
  Tensor mean = empty({v.c}, ScalarType::Double), var = empty({v.c}, ScalarType::Double);
  return with_type(x, [&](auto tag) -> Three {
    using T = decltype(tag);
    const Mask valid(mask, v);
    const Parameter<double> w(weight), b(bias);
    Affine<T> a(v, true);
    const auto parts = channel_parts(data<T>(in.x), v, valid, eps);
    each_merged(v.c, v.n * parts.chunks, [&](int64_t first, int64_t last) {
      int64_t sums[kMerged * kMoments] = {};
      Part all[kMerged];
      if (reproducible) add_exactly(parts, first, last, sums);
      const auto exact = [&](int64_t c) { return reproducible && on_grid(sums + c * kMoments, sizeof(Wide<T>) == 4); };
      bool every = true;
      for (int64_t c = 0; c < last - first; ++c) every = every && exact(c);
      if (!every)
        parts.each_row([&](const Part* row) {
          for (int64_t c = first; c < last; ++c) all[c - first] += row[c];
        });
      for (int64_t c = 0; c < last - first; ++c) {
        double &m = out<double>(mean)[first + c], &s = out<double>(var)[first + c];
        if (exact(c))
          moments_of(sums + c * kMoments, m, s);
        else
          m = all[c].mean(), s = all[c].var();
        set_forward(a, first + c, statistics<T>(m, s, eps), w.data(), b.data());
      }
    });
    return {transformed(in, x, a, valid, residual, relu), mean, var};
  });
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What a batch's gradients need from outside of it: the order-free sums of all parts of the batch, and their values.
struct Whole {
  const int64_t* sums;
  const double* count;
};

// The sums of dy and of dy * (x - hi) * unit; lo receives what the mean has beside hi, times unit.
template <class T, class Then>
ByChannel<GradientSums> gradient_sums(const Upstream<T>& dy, const T* x, const View& v, const Mask& mask,
                                      const double* mean, const double* var, double eps, std::vector<double>& lo,
                                      const Then& then) {
  Affine<T> a(v, true);
  lo.resize(v.c);
  each_channel(v, [&](int64_t c) {
    const auto of = statistics<T>(mean[c], var[c], eps);
    a.center(c, of);
    lo[c] = of.lo() * of.unit();
  });
  return GradientSum<T>(dy, x, v, a, mask).all(then);
}

// With y, the gradient of a relu comes first; wanted[3] asks for the residual's.
Four backward(const Tensor& grad, const MaybeTensor& y, const Tensor& x, const Tensor& mean_, const Tensor& var_,
              double eps, bool training, const MaybeTensor& mask, bool reproducible, const MaybeTensor& weight,
              std::optional<ScalarType> bias_dtype, const std::vector<bool>& wanted,
              const std::optional<Whole>& whole = {}) {
  const Channels in = channels_of(x, reproducible);
  const Tensor dy = in.in_order(grad);
  const MaybeTensor opened = in.in_order(y);
  const View& v = in.view;
  const Mask valid(mask, v);
  const Parameter<double> m(mean_), s(var_), w(weight);
  const bool want_dw = wanted[1] && weight, want_db = wanted[2] && bias_dtype, want_dr = wanted.size() > 3 && wanted[3];
  std::vector<double> dweight(v.c), dbias(v.c);
  Tensor dx = wanted[0] || want_dr ? fresh_like(in.x) : nothing(x), dr = want_dr ? fresh_like(in.x) : nothing(x);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    const double *means = m.data(), *vars = s.data(), *ws = w.data();
    const Gradient<T> gradient{
        {data<T>(dy), data<T>(opened)}, data<T>(in.x), out<T>(dx), want_dr ? out<T>(dr) : nullptr, !training};
    Affine<T> a(v, true);
    const auto transform = [&](int64_t begin, int64_t end) {
      if (wanted[0] || want_dr) gradient(v, a, valid, begin, end);
    };
    if (!training)
      each_channel(v, [&](int64_t c) {
        const auto of = statistics<T>(means[c], vars[c], eps);
        a.backward(c, of, of.rstd * at(ws, c, 1), 0, 0);
      });
    if (!training && !want_dw && !want_db) return parallel(lines_of(v), 3 * length_of(v), transform);
    std::vector<double> lo;
    const auto sums =
        whole ? ByChannel<GradientSums>(View{})
              : gradient_sums(gradient.dy, gradient.x, v, valid, means, vars, eps, lo, [&](int64_t begin, int64_t end) {
                  if (!training) transform(begin, end);
                });
    const double here = std::max(1.0, valid ? valid.count() : double(v.n * v.s));
    each_merged(v.c, v.n * sums.chunks, [&](int64_t first, int64_t last) {
      int64_t local[kMerged * 2 * kSlots] = {};
      GradientSums merged[kMerged];
      if (!whole) add_gradients(sums, first, last, lo.data() + first, merged, reproducible ? local : nullptr);
      for (int64_t c = first; c < last; ++c) {
        const int64_t* exact = whole          ? whole->sums + 2 * kSlots * c
                               : reproducible ? local + 2 * kSlots * (c - first)
                                              : nullptr;
        GradientSums all = merged[c - first];
        if (whole || (exact && !exact[kDigits] && !exact[kSlots + kDigits] && above_grid<T>(all)))
          all = {value_of(exact).hi, value_of(exact + kSlots).hi};  // else what is off the grid makes NaN or is lost
        const auto of = statistics<T>(means[c], vars[c], eps);
        const double alpha = of.rstd * at(ws, c, 1), count = whole ? std::max(1.0, whole->count[c]) : here;
        dweight[c] = whole || v.values() ? all.dyc * (of.rstd / of.unit()) : 0;
        dbias[c] = all.dy;
        if (training) a.backward(c, of, alpha, alpha * of.rstd * dweight[c] / count, alpha * all.dy / count);
      }
    });
    if (training) parallel(lines_of(v), 3 * length_of(v), transform);
  });
  if (wanted[0]) dx = laid_out(dx, x, in.copied);
  if (want_dr) dr = laid_out(dr, x, in.copied);
  return {wanted[0] ? dx : nothing(x), want_dw ? rounded(dweight, weight->scalar_type()) : nothing(x),
          want_db ? rounded(dbias, *bias_dtype) : nothing(x), dr};
}

void check_headroom(const View& v, int64_t chunks) {
  STD_TORCH_CHECK(v.n * chunks < kMostTerms, "batch_norm: exact sums hold 2^29 parts a channel; there are more; use a ",
                  "smaller batch or reproducible=False.");
}

// The order-free sums of a part of a batch, (C, kMoments), to be added to those of the other parts. Unless the order of
// its examples must not matter either, they are summed first.
Tensor batch_norm_sums(Tensor x, double eps, MaybeTensor mask, bool reproducible) {
  const Channels in = channels_of(x, reproducible);
  const View& v = in.view;
  Tensor sums = empty({v.c, kMoments}, ScalarType::Long);
  std::fill_n(out<int64_t>(sums), v.c * kMoments, 0);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    const auto parts = channel_parts(data<T>(in.x), v, Mask(mask, v), eps);
    check_headroom(v, parts.chunks);
    each_merged(v.c, v.n * parts.chunks, [&](int64_t first, int64_t last) {
      add_exactly(parts, first, last, out<int64_t>(sums) + first * kMoments);
      for (int64_t c = first; c < last; ++c)
        for (int part = 0; part < 2; ++part) carry(out<int64_t>(sums) + c * kMoments + part * kSlots);
    });
  });
  return sums;
}

// Mean, biased variance and count from the sums of all parts.
Three batch_norm_moments(Tensor sums) {
  const int64_t channels = sums.size(0);
  const Tensor given = packed(sums);
  Tensor mean = empty({channels}, ScalarType::Double), var = empty({channels}, ScalarType::Double),
         count = empty({channels}, ScalarType::Double);
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t* of = data<int64_t>(given) + c * kMoments;
    moments_of(of, out<double>(mean)[c], out<double>(var)[c]);
    out<double>(count)[c] = double(of[2 * kSlots]);
  }
  return {mean, var, count};
}

// The order-free sums of dy and of dy * (x - mean) * unit of a part of a batch, (C, 2 * kSlots).
Tensor batch_norm_gradient_sums(Tensor grad, Tensor x, Tensor mean, Tensor var, double eps, MaybeTensor mask,
                                bool reproducible) {
  const Channels in = channels_of(x, reproducible);
  const Tensor dy = in.in_order(grad);
  const View& v = in.view;
  Tensor result = empty({v.c, 2 * kSlots}, ScalarType::Long);
  std::fill_n(out<int64_t>(result), v.c * 2 * kSlots, 0);
  const Parameter<double> m(mean), s(var);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    const double *means = m.data(), *vars = s.data();
    std::vector<double> lo;
    const auto sums = gradient_sums(Upstream<T>{data<T>(dy)}, data<T>(in.x), v, Mask(mask, v), means, vars, eps, lo,
                                    [](int64_t, int64_t) {});
    check_headroom(v, sums.chunks);
    each_merged(v.c, v.n * sums.chunks, [&](int64_t first, int64_t last) {
      GradientSums all[kMerged];
      add_gradients(sums, first, last, lo.data() + first, all, out<int64_t>(result) + first * 2 * kSlots);
      for (int64_t c = 2 * first; c < 2 * last; ++c) carry(out<int64_t>(result) + c * kSlots);
    });
  });
  return result;
}

// The gradients of a part of a batch, from the sums and counts of the whole; dweight and dbias are those of the whole.
Three batch_norm_backward_of_sums(Tensor dy, Tensor x, Tensor mean, Tensor var, double eps, MaybeTensor mask,
                                  Tensor sums, Tensor count, MaybeTensor weight, std::optional<ScalarType> bias_dtype,
                                  std::vector<bool> output_mask) {
  const Tensor all = packed(sums), counts = packed(count);
  auto [dx, dw, db, dr] = backward(dy, {}, x, mean, var, eps, true, mask, true, weight, bias_dtype, output_mask,
                                   Whole{data<int64_t>(all), data<double>(counts)});
  return {dx, dw, db};
}

Tensor batch_norm(const Tensor& x, const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& weight,
                  const MaybeTensor& bias, double eps, const MaybeTensor& mask) {
  return eval(x, running_mean, running_var, weight, bias, eps, mask, {}, false);
}

Tensor batch_norm_relu(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                       const MaybeTensor& weight, const MaybeTensor& bias, double eps, const MaybeTensor& mask,
                       const MaybeTensor& residual) {
  return eval(x, running_mean, running_var, weight, bias, eps, mask, residual, true);
}

Three batch_norm_forward(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps, MaybeTensor mask,
                         bool reproducible) {
  return forward(x, weight, bias, eps, mask, {}, false, reproducible);
}

Three batch_norm_relu_forward(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps, MaybeTensor mask,
                              MaybeTensor residual, bool reproducible) {
  return forward(x, weight, bias, eps, mask, residual, true, reproducible);
}

Three batch_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, double eps, bool training, MaybeTensor mask,
                          bool reproducible, MaybeTensor weight, std::optional<ScalarType> bias_dtype,
                          std::vector<bool> output_mask) {
  auto [dx, dw, db, dr] =
      backward(dy, {}, x, mean, var, eps, training, mask, reproducible, weight, bias_dtype, output_mask);
  return {dx, dw, db};
}

Four batch_norm_relu_backward(Tensor dy, Tensor y, Tensor x, Tensor mean, Tensor var, double eps, bool training,
                              MaybeTensor mask, bool reproducible, MaybeTensor weight,
                              std::optional<ScalarType> bias_dtype, std::vector<bool> output_mask) {
  return backward(dy, y, x, mean, var, eps, training, mask, reproducible, weight, bias_dtype, output_mask);
}

// running = (1 - momentum) * running + momentum * batch, for statistics of shape (C) or (N, C), averaged over N.
// `total` has the values of each channel, in place of `count`, where only the data tells.
void update_running_(Tensor running_mean, Tensor running_var, MaybeTensor num_batches_tracked, Tensor mean, Tensor var,
                     int64_t count, std::optional<double> momentum, MaybeTensor mask, MaybeTensor total) {
  const int64_t channels = running_mean.numel(), rows = channels ? mean.numel() / channels : 0;
  double factor = momentum.value_or(0);
  if (num_batches_tracked) {
    STD_TORCH_CHECK(num_batches_tracked->scalar_type() == ScalarType::Long,
                    "batch_norm: num_batches_tracked must be int64; it is not; convert it with .long().");
    const int64_t steps = ++*out<int64_t>(*num_batches_tracked);
    if (!momentum) factor = 1.0 / double(steps);
  }
  const MaybeTensor valid = mask ? MaybeTensor(packed(*mask)) : mask;
  const Parameter<double> m(mean), v(var);
  std::vector<double> n(rows, double(count));
  if (valid && rows) {
    const int64_t each = valid->numel() / rows;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t in = 0;
      for (int64_t k = 0; k < each; ++k) in += data<bool>(valid)[r * each + k];
      n[r] = each ? double(in) * double(count) / double(each) : 0;
    }
  }
  const Parameter<double> counts(total);
  const auto move = [&](const Tensor& running, const double* batch, bool is_var) {
    with_type(running, [&](auto tag) {
      using P = decltype(tag);
      const double limit = largest<P>();
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        int64_t informed = 0;
        for (int64_t r = 0; r < rows; ++r) {
          const double values = at(counts.data(), c, n[r]);
          if (!(values > (is_var ? 1 : 0))) continue;
          sum += batch[r * channels + c] * (is_var ? values / (values - 1) : 1);
          ++informed;
        }
        if (!informed) continue;
        const double average = std::min(sum / double(informed), limit);
        P* to = out<P>(running) + c * running.stride(0);
        put(to, Wide<P>((1 - factor) * double(get(to)) + factor * (std::isnan(sum) ? sum : average)));
      }
    });
  };
  move(running_mean, m.data(), false);
  move(running_var, v.data(), true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normwise, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_forward", TORCH_BOX(&batch_norm_forward));
  m.impl("update_running_", TORCH_BOX(&update_running_));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("batch_norm_sums", TORCH_BOX(&batch_norm_sums));
  m.impl("batch_norm_moments", TORCH_BOX(&batch_norm_moments));
  m.impl("batch_norm_gradient_sums", TORCH_BOX(&batch_norm_gradient_sums));
  m.impl("batch_norm_backward_of_sums", TORCH_BOX(&batch_norm_backward_of_sums));
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu));
  m.impl("batch_norm_relu_forward", TORCH_BOX(&batch_norm_relu_forward));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward));
}

}  // namespace normwise
