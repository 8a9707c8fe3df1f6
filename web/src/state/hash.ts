// The whole state as a readable link: #v=1&x=2,4,6;3,5,7&scene=poke. What a link says is checked before it is used.

import type { Batch } from "../kernel/normalize";
import { parse, sizes } from "../kernel/pattern";

export const SCENES = [
  "poke", "number", "cube", "size", "eval", "shards", "future", "padding",
  "backward", "blind", "conventions", "numerics", "jacobian", "recording",
] as const;
export type SceneId = (typeof SCENES)[number];

export const CHANGES = ["none", "feature-double", "feature-shrink", "feature-shift", "sample-double", "sample-shrink", "sample-shift"] as const;
export type Change = (typeof CHANGES)[number];

export interface State {
  batch: Batch;
  scene: SceneId;
  cell: number; // the pinned value, as an index into the batch
  size: number; // samples in a sub-batch
  beside: readonly number[]; // the sub-batch that is picked: who is in it with the pinned sample
  steps: number; // training steps before eval
  momentum: number;
  repair: boolean; // eval without the share of the starting values
  processes: number;
  ranks: readonly number[]; // the process of each sample
  pattern: string; // the norm whose groups the cube shows
  group: number; // the group that is picked in it
  dy: readonly number[] | null; // the gradient that comes in, null for the one prepared
  text: readonly string[]; // two sequences of letters
  padding: number; // rows of zeros
  change: Change; // what is done to the pinned feature or sample
  offset: number; // a power of ten, added to the pinned feature
  puzzle: number; // the step of the tour, -1 outside
  hide: boolean; // answers wait for a prediction
  large: boolean; // type for a projector
}

export const LIMITS = { length: 60_000, cells: 4096, samples: 64, value: 1e12, letters: 12, padding: 8, steps: 200, offset: 7 };

/** The state as a link, without what is as in `initial`. */
export function write(state: State, initial: State): string {
  const parts: [string, string][] = [];
  if (state.batch !== initial.batch) {
    const { shape, layout } = state.batch;
    if (layout !== "nc") parts.push(["layout", layout], ["shape", shape.join(",")]);
    parts.push(["x", rowsOf(state.batch).map((row) => row.join(",")).join(";")]);
  }
  for (const field of FIELDS) if (field.write(state) !== field.write(initial)) parts.push([field.name, field.write(state)]);
  return `#v=1${parts.map(([name, text]) => `&${name}=${encode(text)}`).join("")}`;
}

const encode = (text: string): string =>
  encodeURIComponent(text).replace(/%2C/g, ",").replace(/%3B/g, ";").replace(/%3E/g, ">").replace(/%2F/g, "/").replace(/%20/g, "+");

/** The state that a link describes, starting from `initial`; throws one sentence where it cannot be. */
export function read(hash: string, initial: State): State {
  const text = hash.replace(/^#/, "");
  if (text.length > LIMITS.length) throw new Error(`link: it may have ${LIMITS.length} characters; got ${text.length}; use a smaller batch.`);
  if (!text) return initial;
  const given = new Map(text.split("&").map((part) => {
    const [name, ...rest] = part.split("=");
    return [name, decode(rest.join("="))] as const;
  }));
  if (given.get("v") !== "1") throw new Error(`link: this page reads version v=1; got ${quoted(given.get("v") ?? "none")}; copy the link again.`);
  let state = initial;
  const x = given.get("x");
  if (x !== undefined) {
    state = adapted(state, readBatch(x, given.get("layout") ?? "nc", given.get("shape")));
  }
  for (const field of FIELDS) {
    const said = given.get(field.name);
    if (said !== undefined) state = { ...state, ...field.read(said, state) };
  }
  return state;
}

/** A state for another batch: what depended on the old one starts anew. */
export function adapted(state: State, batch: Batch): State {
  const samples = batch.shape[0];
  return {
    ...state,
    batch,
    cell: state.cell < batch.values.length ? state.cell : 0,
    size: Math.min(state.size, samples),
    beside: state.beside.every((sample) => sample < samples) ? state.beside : [],
    ranks: state.ranks.length === samples ? state.ranks : dealt(samples),
    dy: state.dy?.length === batch.values.length ? state.dy : null,
  };
}

/** The samples on two ranks: the first half on one, the rest on the other. */
export const halves = (samples: number): number[] => Array.from({ length: samples }, (_, i) => (i < samples / 2 ? 0 : 1));

/** As teams are picked, 0110 0110: in the worked batch the halves' means agree by chance, these do not. */
export const dealt = (samples: number): number[] => Array.from({ length: samples }, (_, i) => (((i + 1) >> 1) & 1));

/** Rows of channels: the view in which every batch is shown and written. */
export function rowsOf(batch: Batch): number[][] {
  const channels = batch.shape[batch.layout.indexOf("c")];
  const place = indexOf(batch);
  return Array.from({ length: batch.values.length / channels }, (_, r) =>
    Array.from({ length: channels }, (_, c) => batch.values[place(r, c)]));
}

/** Where the value in row r and column c of the view stands in the batch. */
export function indexOf(batch: Batch): (row: number, channel: number) => number {
  const axis = batch.layout.indexOf("c");
  const channels = batch.shape[axis];
  const inner = batch.shape.slice(axis + 1).reduce((a, b) => a * b, 1);
  return (r, c) => Math.floor(r / inner) * inner * channels + c * inner + (r % inner);
}

function readBatch(text: string, layout: string, shape: string | undefined): Batch {
  const rows = text.split(";").map((row) => row.split(","));
  const count = rows.reduce((sum, row) => sum + row.length, 0);
  if (count > LIMITS.cells) throw new Error(`x: it may have ${LIMITS.cells} values; got ${count}; use normwise open with a file.`);
  const width = rows[0].length;
  const ragged = rows.findIndex((row) => row.length !== width);
  if (ragged >= 0) throw new Error(`x: every row must have ${width} values; row ${ragged} has ${rows[ragged].length}; correct the link.`);
  const values = rows.flat().map((word) => number(word, "x", LIMITS.value));
  if (!/^n[a-z]{1,4}$/.test(layout) || !layout.includes("c") || new Set(layout).size !== layout.length)
    throw new Error(`layout: it must start with n and have c once; got ${quoted(layout)}; write nc.`);
  const lengths = shape === undefined ? [rows.length, width] : shape.split(",").map((word) => whole(word, "shape", 1, LIMITS.cells));
  const product = lengths.reduce((a, b) => a * b, 1);
  if (lengths.length !== layout.length || product !== values.length || lengths[layout.indexOf("c")] !== width)
    throw new Error(`shape: it must fit ${rows.length} rows of ${width} as ${layout}; got ${lengths.join(",")}; correct the link.`);
  const batch = { shape: lengths, layout, values: new Array<number>(values.length).fill(0) };
  const place = indexOf(batch);
  values.forEach((value, i) => (batch.values[place(Math.floor(i / width), i % width)] = value));
  return batch;
}

interface Field {
  name: string;
  write(state: State): string;
  read(text: string, state: State): Partial<State>;
}

const FIELDS: Field[] = [
  {
    name: "scene",
    write: (s) => s.scene,
    read(text) {
      if (!(SCENES as readonly string[]).includes(text)) throw new Error(`scene: it must be one of ${SCENES.join(", ")}; got ${quoted(text)}; choose one.`);
      return { scene: text as SceneId };
    },
  },
  { name: "cell", write: (s) => String(s.cell), read: (text, s) => ({ cell: whole(text, "cell", 0, s.batch.values.length - 1) }) },
  { name: "size", write: (s) => String(s.size), read: (text, s) => ({ size: whole(text, "size", 1, s.batch.shape[0]) }) },
  {
    name: "beside",
    write: (s) => s.beside.join(","),
    read(text, s) {
      const beside = text === "" ? [] : text.split(",").map((word) => whole(word, "beside", 0, s.batch.shape[0] - 1));
      if (new Set(beside).size !== beside.length) throw new Error(`beside: each sample may be named once; got ${quoted(text)}; correct the link.`);
      return { beside };
    },
  },
  { name: "steps", write: (s) => String(s.steps), read: (text) => ({ steps: whole(text, "steps", 0, LIMITS.steps) }) },
  {
    name: "momentum",
    write: (s) => String(s.momentum),
    read(text) {
      const momentum = number(text, "momentum", 1);
      if (momentum <= 0) throw new Error(`momentum: it must be above 0; got ${momentum}; use for example 0.1.`);
      return { momentum };
    },
  },
  { name: "repair", write: (s) => (s.repair ? "exact" : ""), read: (text) => ({ repair: oneOf(text, "repair", "exact") }) },
  { name: "processes", write: (s) => String(s.processes), read: (text) => ({ processes: whole(text, "processes", 2, 4) }) },
  {
    name: "ranks",
    write: (s) => s.ranks.join(""),
    read(text, s) {
      if (!/^[0-7]*$/.test(text) || text.length !== s.batch.shape[0])
        throw new Error(`ranks: it must be a digit 0 to 7 for each of ${s.batch.shape[0]} samples; got ${quoted(text)}; correct the link.`);
      return { ranks: [...text].map(Number) };
    },
  },
  {
    name: "pattern",
    write: (s) => s.pattern,
    read(text) {
      const pattern = parse(text.slice(0, 80));
      sizes(pattern, pattern.left.map(() => 4), { g: 2 });
      return { pattern: text.slice(0, 80) };
    },
  },
  { name: "group", write: (s) => String(s.group), read: (text) => ({ group: whole(text, "group", 0, LIMITS.cells) }) },
  {
    name: "dy",
    write: (s) => s.dy?.join(",") ?? "",
    read(text, s) {
      if (!text) return { dy: null };
      const dy = text.split(",");
      if (dy.length !== s.batch.values.length)
        throw new Error(`dy: it must have a number for each of ${s.batch.values.length} values; got ${dy.length}; correct the link.`);
      return { dy: dy.map((word) => number(word, "dy", LIMITS.value)) };
    },
  },
  {
    name: "text",
    write: (s) => s.text.join("/"),
    read(text) {
      const lines = text.split("/");
      const width = lines[0].length;
      if (lines.length < 1 || lines.length > 4 || width < 2 || width > LIMITS.letters || lines.some((l) => !/^[a-z_]*$/.test(l) || l.length !== width))
        throw new Error(`text: it must be 1 to 4 words of 2 to ${LIMITS.letters} letters a-z, equally long; got ${quoted(text)}; write the_cat/sat_mat.`);
      return { text: lines };
    },
  },
  { name: "padding", write: (s) => String(s.padding), read: (text) => ({ padding: whole(text, "padding", 0, LIMITS.padding) }) },
  {
    name: "change",
    write: (s) => s.change,
    read(text) {
      if (!(CHANGES as readonly string[]).includes(text)) throw new Error(`change: it must be one of ${CHANGES.join(", ")}; got ${quoted(text)}; choose one.`);
      return { change: text as Change };
    },
  },
  { name: "offset", write: (s) => String(s.offset), read: (text) => ({ offset: whole(text, "offset", 0, LIMITS.offset) }) },
  { name: "tour", write: (s) => String(s.puzzle), read: (text) => ({ puzzle: whole(text, "tour", -1, 8) }) },
  { name: "hide", write: (s) => (s.hide ? "answers" : ""), read: (text) => ({ hide: oneOf(text, "hide", "answers") }) },
  { name: "type", write: (s) => (s.large ? "large" : ""), read: (text) => ({ large: oneOf(text, "type", "large") }) },
];

function decode(text: string): string {
  try {
    return decodeURIComponent(text.replace(/\+/g, " "));
  } catch {
    throw new Error(`link: ${quoted(text)} is no text; copy the link again.`);
  }
}

function number(text: string, name: string, limit: number): number {
  const value = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(text.trim()) ? Number(text) : NaN;
  if (!(Math.abs(value) <= limit)) throw new Error(`${name}: each value must be a number up to ${limit}; got ${quoted(text)}; correct it.`);
  return value;
}

function whole(text: string, name: string, low: number, high: number): number {
  const value = /^-?\d{1,9}$/.test(text) ? Number(text) : NaN;
  if (!(value >= low && value <= high)) throw new Error(`${name}: it must be a whole number from ${low} to ${high}; got ${quoted(text)}; correct it.`);
  return value;
}

function oneOf(text: string, name: string, word: string): boolean {
  if (text !== word && text !== "") throw new Error(`${name}: it can be ${word}; got ${quoted(text)}; correct the link.`);
  return text === word;
}

const quoted = (text: string): string => JSON.stringify(text.length > 40 ? `${text.slice(0, 40)}…` : text);
