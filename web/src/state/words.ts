// Numbers and names as the screen writes them, the same as the command line's.

import type { Norm } from "../kernel/normalize";
import { averaged, parse } from "../kernel/pattern";
import type { Batch } from "../kernel/normalize";

/** An output: three decimals, or an exponent where these would hide it. */
export function output(v: number, precision = 3): string {
  if (!Number.isFinite(v)) return Number.isNaN(v) ? "nan" : v > 0 ? "inf" : "−inf";
  const plain = v === 0 || (Math.abs(v) >= 0.5 * 10 ** -precision && Math.abs(v) < 1e5);
  return minus(plain ? (v + 0).toFixed(precision) : v.toExponential(2));
}

/** An input or a statistic: no more digits than it has. */
export function short(v: number, precision = 3): string {
  if (!Number.isFinite(v)) return output(v);
  if (v !== 0 && (Math.abs(v) < 10 ** -precision || Math.abs(v) >= 1e6)) return minus(v.toExponential(2).replace(/\.?0+e/, "e"));
  return minus(String(Number((v + 0).toFixed(precision))));
}

/** With a sign, for a change. */
export const signed = (v: number, precision = 3): string => (v > 0 ? "+" : "") + output(v, precision);

/** How far apart two numbers are, of floating point: 4e-16. */
export const tiny = (v: number): string => (v === 0 ? "0" : minus(v.toExponential(0)));

const minus = (text: string): string => text.replace(/-/g, "\u2212");

const PREFIX: Record<string, string> = { n: "s" };
const WORDS: Record<string, [string, string]> = {
  n: ["sample", "samples"], c: ["channel", "channels"], l: ["position", "positions"], h: ["row", "rows"],
  w: ["column", "columns"], d: ["slice", "slices"], g: ["group", "groups"],
};

export const prefix = (axis: string, layout: string): string => (axis === "c" && layout === "nc" ? "f" : PREFIX[axis] ?? axis);

export const word = (axis: string, layout: string, many = false): string =>
  axis === "c" && layout === "nc" ? (many ? "features" : "feature") : (WORDS[axis] ?? [axis, `${axis}s`])[many ? 1 : 0];

/** The names of the rows of the view, "s0" or "s0,l2"; and of its columns. */
export function rowNames({ shape, layout }: Batch): string[] {
  const axes = [...layout].map((axis, i) => ({ axis, n: shape[i] })).filter(({ axis }) => axis !== "c");
  return axes.reduce<string[]>(
    (names, { axis, n }) => names.flatMap((name) => Array.from({ length: n }, (_, i) => (name ? `${name},` : "") + prefix(axis, layout) + i)),
    [""],
  );
}

export const columnNames = ({ shape, layout }: Batch): string[] =>
  Array.from({ length: shape[layout.indexOf("c")] }, (_, i) => prefix("c", layout) + i);

/** What keeps statistics of its own: "feature", "sample", "position of each sample". */
export function unit(norm: Norm, layout: string): string {
  const pattern = parse(norm.pattern);
  const within = pattern.right.filter((axis) => axis !== "n").map((axis) => word(axis, layout));
  if (!within.length) return pattern.right.length ? "sample" : "batch";
  const all = [...layout].filter((axis) => !"nc".includes(axis));
  const text = within.join() === ["row", "column"].join() ? "pixel" : within.length === all.length && all.length > 1 ? "position" : within.join(" and ");
  return pattern.right.includes("n") ? `${text} of each sample` : text;
}

export const overWhat = (norm: Norm, layout: string): string => averaged(parse(norm.pattern)).map((axis) => word(axis, layout, true)).join(", ");

export const plural = (n: number, one: string, many = `${one}s`): string => `${n} ${n === 1 ? one : many}`;

/** "a", "a and b", "a, b and c". */
export const listed = (items: readonly string[]): string =>
  items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items.at(-1)}`;

/** The name of a value among those that share its mean: by the axes that are averaged. */
export function memberName(norm: Norm, { shape, layout, values }: Batch, index: number): string {
  const { left, right } = parse(norm.pattern);
  let inner = values.length;
  return [...layout].flatMap((axis, k) => {
    inner /= shape[k];
    return left[k].every((name) => right.includes(name)) ? [] : [prefix(axis, layout) + (Math.floor(index / inner) % shape[k])];
  }).join(",");
}
