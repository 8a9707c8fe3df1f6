// Any norm, forward and backward, in float64: the page's own arithmetic, checked on load against what Python computed.

import { indices, parse, sizes, type Pattern } from "./pattern";

export interface Norm {
  name: string;
  title: string;
  pattern: string;
  affine: string; // the axes of weight and bias, "c" or "(g c)"
  centred: boolean; // false for RMSNorm
  eps: number;
  given: Record<string, number>; // parts of split axes
  weight: readonly number[] | null;
  bias: readonly number[] | null;
  running: { mean: readonly number[]; var: readonly number[] } | null; // used in place of the batch's own
}

export interface Batch {
  shape: readonly number[];
  layout: string; // a letter for each axis: n samples, c channels
  values: readonly number[];
}

export interface Result {
  y: Float64Array;
  xhat: Float64Array;
  mean: Float64Array; // one for each group
  var: Float64Array; // biased
  rstd: Float64Array;
  group: Int32Array; // which group each value is in
  m: number; // values behind each statistic
}

/** A sum whose rounding errors are added up too (Neumaier 1974): one stream for each group. */
class Sums {
  readonly sum: Float64Array;
  private readonly lost: Float64Array;
  constructor(count: number) {
    this.sum = new Float64Array(count);
    this.lost = new Float64Array(count);
  }
  add(g: number, value: number): void {
    const before = this.sum[g];
    const after = before + value;
    this.lost[g] += Math.abs(before) >= Math.abs(value) ? before - after + value : value - after + before;
    this.sum[g] = after;
  }
  total(g: number): number {
    const all = this.sum[g] + this.lost[g];
    return Number.isFinite(this.lost[g]) ? all : this.sum[g];
  }
}

/** Normalizes a batch; values where `valid` is 0 count in no statistic and come out as 0. */
export function normalize(batch: Batch, norm: Norm, valid?: readonly number[]): Result {
  const { x, group, affine, count } = layOut(batch, norm);
  const own = norm.running === null;
  const { mean, variance, m } = own ? moments(x, group, count, norm.centred, valid) : kept(norm, count, x.length);
  const rstd = variance.map((v) => 1 / Math.sqrt(v + norm.eps));
  const xhat = new Float64Array(x.length);
  const y = new Float64Array(x.length);
  for (let i = 0; i < x.length; i++) {
    if (valid && !valid[i]) continue;
    xhat[i] = (x[i] - mean[group[i]]) * rstd[group[i]];
    y[i] = xhat[i] * (norm.weight?.[affine[i]] ?? 1) + (norm.bias?.[affine[i]] ?? 0);
  }
  return { y, xhat, mean, var: variance, rstd, group, m };
}

function layOut(batch: Batch, norm: Norm): { x: readonly number[]; group: Int32Array; affine: Int32Array; count: number } {
  const pattern: Pattern = parse(norm.pattern);
  const size = sizes(pattern, batch.shape, norm.given);
  const group = indices(pattern, size, pattern.right);
  const affine = indices(pattern, size, norm.affine.replace(/[()]/g, " ").trim().split(/\s+/));
  const count = pattern.right.reduce((product, name) => product * size[name], 1);
  return { x: batch.values, group, affine, count };
}

function kept(norm: Norm, count: number, total: number): { mean: Float64Array; variance: Float64Array; m: number } {
  const { mean, var: variance } = norm.running!; // one for each channel, also where each sample has its own
  const spread = (values: readonly number[]) => Float64Array.from({ length: count }, (_, g) => values[g % values.length]);
  return { mean: spread(mean), variance: spread(variance), m: total / count };
}

/** Mean and biased variance of each group, about an anchor of its own so that a large mean costs nothing. */
export function moments(
  x: readonly number[], group: Int32Array, count: number, centred = true, valid?: readonly number[],
): { mean: Float64Array; variance: Float64Array; m: number } {
  const anchor = new Float64Array(count).fill(NaN);
  const values = new Float64Array(count);
  const first = new Sums(count);
  for (let i = 0; i < x.length; i++) {
    if (valid && !valid[i]) continue;
    const g = group[i];
    if (!values[g]) anchor[g] = centred ? x[i] : 0;
    values[g]++;
    first.add(g, x[i] - anchor[g]);
  }
  const shift = values.map((n, g) => (centred && n ? first.total(g) / n : 0));
  const second = new Sums(count);
  const rest = new Sums(count);
  for (let i = 0; i < x.length; i++) {
    if (valid && !valid[i]) continue;
    const g = group[i];
    const c = x[i] - anchor[g] - shift[g];
    second.add(g, c * c);
    rest.add(g, c);
  }
  const mean = new Float64Array(count);
  const variance = new Float64Array(count);
  for (let g = 0; g < count; g++) {
    const n = Math.max(values[g], 1);
    const residual = centred ? rest.total(g) / n : 0; // what the mean's own rounding left
    mean[g] = centred ? anchor[g] + (shift[g] + residual) : 0;
    variance[g] = Math.max(second.total(g) / n - residual * residual, 0);
    if (Number.isNaN(second.total(g))) variance[g] = NaN;
  }
  return { mean, variance, m: count ? x.length / count : 0 };
}

export interface Gradient {
  dx: Float64Array;
  direct: Float64Array; // dx = direct + throughMean + throughVar
  throughMean: Float64Array;
  throughVar: Float64Array;
  dweight: Float64Array;
  dbias: Float64Array;
}

/** The gradient of a loss whose derivative by y is `dy`. */
export function backward(batch: Batch, norm: Norm, forward: Result, dy: readonly number[]): Gradient {
  const { x, group, affine, count } = layOut(batch, norm);
  const g = Float64Array.from(dy, (v, i) => v * (norm.weight?.[affine[i]] ?? 1));
  const sum = new Sums(count);
  const product = new Sums(count);
  const parameters = norm.weight?.length ?? Math.max(...affine) + 1;
  const weights = new Sums(parameters);
  const biases = new Sums(parameters);
  for (let i = 0; i < x.length; i++) {
    sum.add(group[i], g[i]);
    product.add(group[i], g[i] * forward.xhat[i]);
    weights.add(affine[i], dy[i] * forward.xhat[i]);
    biases.add(affine[i], dy[i]);
  }
  const own = norm.running === null;
  const [direct, throughMean, throughVar, dx] = [0, 0, 0, 0].map(() => new Float64Array(x.length));
  for (let i = 0; i < x.length; i++) {
    const k = group[i];
    direct[i] = forward.rstd[k] * g[i];
    throughMean[i] = own && norm.centred ? (-forward.rstd[k] * sum.total(k)) / forward.m : 0;
    throughVar[i] = own ? (-forward.rstd[k] * forward.xhat[i] * product.total(k)) / forward.m : 0;
    dx[i] = direct[i] + throughMean[i] + throughVar[i];
  }
  const all = (sums: Sums) => Float64Array.from({ length: parameters }, (_, i) => sums.total(i));
  return { dx, direct, throughMean, throughVar, dweight: all(weights), dbias: all(biases) };
}
