// Letters as three small numbers each, by a rule that can be checked by hand; no letter has three equal ones.

import { normalize, type Batch, type Norm } from "./normalize";

export const ALPHABET = "_abcdefghijklmnopqrstuvwxyz";

export function code(letter: string): number[] {
  const k = ALPHABET.indexOf(letter);
  return [k % 5, k % 7, 9 - (k % 9)];
}

/** Words of one length as a batch of sequences, (N, L, C). */
export const sequences = (text: readonly string[]): Batch => ({
  shape: [text.length, text[0].length, 3], layout: "nlc", values: text.flatMap((word) => [...word].flatMap(code)),
});

export interface Move {
  word: number;
  at: number;
  old: number[]; // the letter's three outputs
  now: number[];
  most: number; // which of them moved furthest
  size: number; // and how far
  bits: number; // so many are not what they were, to the last bit
}

/** What every letter's output did when `before` became `text`, in the order of the batch. */
export function moves(norm: Norm, before: readonly string[], text: readonly string[]): Move[] {
  const [old, now] = [before, text].map((words) => Array.from(normalize(sequences(words), norm).y));
  return text.flatMap((letters, word) => [...letters].map((_, at) => {
    const three = [0, 1, 2].map((i) => (word * letters.length + at) * 3 + i);
    const sizes = three.map((i) => Math.abs(now[i] - old[i]));
    const size = Math.max(...sizes);
    return {
      word, at, size, most: sizes.indexOf(size), bits: three.filter((i) => !Object.is(old[i], now[i])).length,
      old: three.map((i) => old[i]), now: three.map((i) => now[i]),
    };
  }));
}

/** Where each word first differs; its length where it does not. */
export const firstChange = (before: readonly string[], text: readonly string[]): number[] =>
  text.map((letters, word) => {
    const at = [...letters].findIndex((letter, i) => letter !== before[word][i]);
    return at < 0 ? letters.length : at;
  });
