// Statistics of parts, sample by sample or process by process, and those of the whole that follow from them.

import { moments, type Batch, type Norm, type Result } from "./normalize";

export interface Part {
  count: number; // values
  mean: number;
  var: number; // biased
}

export interface Whole extends Part {
  within: number; // var = within + between: the parts' own spread, and that of their means
  between: number;
}

/** Of each sample, the values that share their statistics with the one at `cell`. */
export function partsOf(batch: Batch, norm: Norm, result: Result, cell: number): Part[] {
  const samples = batch.shape[0];
  const each = batch.values.length / samples;
  const valid = Array.from(result.group, (g) => Number(g === result.group[cell]));
  const sample = Int32Array.from(batch.values, (_, i) => Math.floor(i / each));
  const { mean, variance } = moments(batch.values, sample, samples, norm.centred, valid);
  const count = new Array<number>(samples).fill(0);
  valid.forEach((counts, i) => (count[sample[i]] += counts));
  return count.map((n, s) => ({ count: n, mean: mean[s], var: variance[s] }));
}

/** The statistics of all parts together: counts, means and variances are enough. */
export function joined(all: readonly Part[]): Whole {
  const parts = all.filter((part) => part.count);
  const count = parts.reduce((sum, part) => sum + part.count, 0);
  const average = (of: (part: Part) => number): number => parts.reduce((sum, part) => sum + part.count * of(part), 0) / count;
  const anchor = parts[0]?.mean ?? NaN; // a large mean costs nothing
  const mean = anchor + average((part) => part.mean - anchor);
  const within = average((part) => part.var);
  const between = average((part) => (part.mean - mean) ** 2);
  return { count, mean, var: within + between, within, between };
}

/** What a value of this channel becomes under a mean and variance. */
export const outputOf = (norm: Norm, channel: number, value: number, by: { mean: number; var: number }): number =>
  ((value - by.mean) / Math.sqrt(by.var + norm.eps)) * (norm.weight?.[channel] ?? 1) + (norm.bias?.[channel] ?? 0);
