// The comparison that Python embedded: its batch, its norms, and every number to check our own against.

import { normalize, type Batch, type Norm } from "../kernel/normalize";
import { named } from "../kernel/norms";
import { averaged, parse } from "../kernel/pattern";

type Numbers = (number | string | Numbers)[];

interface TraceData {
  name: string;
  title: string;
  pattern: string;
  affine: string;
  centred: boolean;
  training: boolean;
  eps: number;
  sizes: Record<string, number>;
  refused: string | null;
  weight: Numbers | null;
  bias: Numbers | null;
  running: { mean: Numbers; var: Numbers } | null;
  statistics: { mean: Numbers; var: Numbers; rstd: Numbers } | null;
  xhat: Numbers | null;
  y: Numbers | null;
}

export interface ComparisonData {
  schema: string;
  version: number;
  batch: { name: string; notes: string[]; shape: number[]; layout: string; dtype: string; feature_names: string[]; values: Numbers };
  mode: string;
  cell: number[];
  norms: TraceData[];
}

export const WORKED: Batch = { shape: [4, 3], layout: "nc", values: [2, 4, 6, 3, 5, 7, 1, 3, 5, 4, 6, 8] };

/** What stands in a JSON element of the page, or null. */
export function embedded<T>(id: string): T | null {
  const text = document.getElementById(id)?.textContent?.trim();
  return text ? (JSON.parse(text) as T | null) : null;
}

/** Nested lists as one; NaN and infinities are strings in JSON. A corner of a large array is not the whole: null. */
export function flat(values: Numbers | object | null): number[] | null {
  if (values === null || !Array.isArray(values)) return null;
  return ((values as unknown[]).flat(Infinity) as (number | string)[]).map(Number);
}

/** The embedded batch, if all of it is there. */
export function batchOf(data: ComparisonData): Batch | null {
  const values = flat(data.batch.values);
  return values && { shape: data.batch.shape, layout: data.batch.layout, values };
}

/** What is embedded of a large batch: a corner, as a batch of its own. */
export function cornerOf(data: ComparisonData): Batch {
  const { corner } = data.batch.values as unknown as { corner: Numbers };
  const shape: number[] = [];
  for (let at: Numbers | number | string = corner; Array.isArray(at); at = at[0]) shape.push(at.length);
  return { shape, layout: data.batch.layout, values: flat(corner)! };
}

/** What each trace computed, as the kernel takes it. */
export function normOf(t: TraceData): Norm {
  const split = parse(t.pattern).left.filter((item) => item.length > 1).flat();
  const running = t.training || !t.running ? null : { mean: flat(t.running.mean)!, var: flat(t.running.var)! };
  return {
    name: t.name, title: t.title, pattern: t.pattern, affine: t.affine, centred: t.centred, eps: t.eps,
    given: Object.fromEntries(split.map((name) => [name, t.sizes[name]])),
    weight: flat(t.weight), bias: flat(t.bias), running,
  };
}

const fits = (data: ComparisonData, batch: Batch): boolean =>
  data.batch.shape.slice(1).join() === batch.shape.slice(1).join() && data.batch.layout === batch.layout;

/** Why a norm of the comparison has no result: what Python said. */
export const refusals = (data: ComparisonData | null, batch: Batch): string[] =>
  data && data.batch.shape.join() === batch.shape.join() && fits(data, batch) ? data.norms.flatMap((t) => t.refused ?? []) : [];

/** The norms of the comparison for a batch that may have another shape by now: then without weights, by name. */
export function normsFor(data: ComparisonData | null, batch: Batch): Norm[] {
  const given = data && fits(data, batch) ? data.norms.filter((t) => !t.refused).map(normOf) : [];
  return given.length ? given : [named("batch_norm", batch.layout), named("layer_norm", batch.layout)];
}

export interface Check {
  largest: number; // relative to the largest value of its kind
  values: number; // so many were compared
  wrong: string; // what differs, or empty
}

const ROUNDING: Record<string, number> = { float64: 1e-11, float32: 1e-6, bfloat16: 1e-2, float16: 2e-3 };

/** Compute the embedded comparison once more, and compare every number. */
export function verify(data: ComparisonData): Check {
  const check: Check = { largest: 0, values: 0, wrong: "" };
  const batch = batchOf(data);
  if (!batch) return check;
  for (const t of data.norms) {
    if (t.refused || !t.statistics) continue;
    const own = normalize(batch, normOf(t));
    const pairs: [string, ArrayLike<number>, Numbers | null, number][] = [
      ["mean", own.mean, t.statistics.mean, 1e-11],
      ["variance", own.var, t.statistics.var, 1e-11],
      ["normalized values", own.xhat, t.xhat, 1e-11],
      ["output", own.y, t.y, ROUNDING[data.batch.dtype] ?? 1e-2],
    ];
    for (const [what, ours, theirs, tolerance] of pairs) {
      const expected = flat(theirs) ?? (typeof theirs === "number" ? [theirs] : null);
      if (!expected) continue;
      const { apart, at } = distance(ours, expected, magnitude(batch, what));
      check.values += expected.length;
      if (tolerance < 1e-6) check.largest = Math.max(check.largest, apart);
      if (!(apart <= tolerance) && !check.wrong)
        check.wrong = `${t.title}, ${what}, value ${at}: this page computes ${ours[at % ours.length]}, the file says ${expected[at]}`;
    }
  }
  return check;
}

/** A mean of values that cancel is compared at the size of the values. */
function magnitude(batch: Batch, what: string): number {
  const finite = batch.values.filter(Number.isFinite).map(Math.abs);
  const size = finite.reduce((a, b) => Math.max(a, b), 0);
  return what === "mean" ? size : what === "variance" ? size * size * 1e-4 : 0;
}

function distance(ours: ArrayLike<number>, theirs: readonly number[], floor: number): { apart: number; at: number } {
  const scale = Math.max(floor, theirs.reduce((a, b) => (Number.isFinite(b) ? Math.max(a, Math.abs(b)) : a), 0)) || 1;
  let [apart, at] = [0, 0];
  for (let i = 0; i < theirs.length; i++) {
    const a = ours[ours.length === 1 ? 0 : i];
    const same = a === theirs[i] || (Number.isNaN(a) && Number.isNaN(theirs[i]));
    const d = same ? 0 : Math.abs(a - theirs[i]) / scale;
    if (!(d <= apart)) [apart, at] = [d, i];
    if (Number.isNaN(apart)) return { apart: Infinity, at };
  }
  return { apart, at };
}

export const averagedAxes = (norm: Norm): string[] => averaged(parse(norm.pattern));
