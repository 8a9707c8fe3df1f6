// Which axes share one mean and variance, as definitions.py writes it: "n c h w -> c".

export interface Pattern {
  left: string[][]; // an item of several names is one axis split into them: (g c)
  right: string[]; // the axes that keep statistics of their own
}

/** Reads "n (g c) h w -> n g"; throws one sentence if it is none. */
export function parse(text: string): Pattern {
  const sides = text.split("->");
  if (sides.length !== 2) throw new Error(`pattern: it must read "axes -> axes"; got "${text}"; write "n c -> c".`);
  const left = axes(sides[0]);
  const right = axes(sides[1]).flat();
  const names = left.flat();
  for (const [i, name] of names.entries())
    if (names.indexOf(name) !== i) throw new Error(`pattern: each axis must be named once; "${name}" comes twice.`);
  const strange = right.find((name) => !names.includes(name));
  if (strange) throw new Error(`pattern: "${strange}" must stand on the left too; "${text}" lacks it there.`);
  if (names.every((name) => right.includes(name)))
    throw new Error(`pattern: at least one axis must be averaged; "${text}" keeps them all; drop one on the right.`);
  return { left, right };
}

function axes(text: string): string[][] {
  const items: string[][] = [];
  for (const [whole, several] of text.matchAll(/\(([^()]*)\)|[^\s()]+|[()]/g)) {
    const names = several === undefined ? [whole] : several.trim().split(/\s+/);
    if (names.some((name) => !/^[a-z][a-z0-9]*$/i.test(name)))
      throw new Error(`pattern: "${whole}" is no axis; use names such as n c h w or (g c).`);
    items.push(names);
  }
  return items;
}

/** The axes over which mean and variance are taken. */
export const averaged = (p: Pattern): string[] => p.left.flat().filter((name) => !p.right.includes(name));

/** True if the examples share statistics; everything particular to Batch Norm follows from it. */
export const averagesBatch = (p: Pattern): boolean => p.left[0].some((name) => !p.right.includes(name));

/** The length of each named axis; of a split axis one part may be missing in `given`. */
export function sizes(p: Pattern, shape: readonly number[], given: Record<string, number> = {}): Record<string, number> {
  if (p.left.length !== shape.length)
    throw new Error(`pattern: it names ${p.left.length} axes; the batch has ${shape.length}; name each.`);
  const found: Record<string, number> = {};
  p.left.forEach((item, i) => {
    const known = item.reduce((product, name) => product * (given[name] ?? 1), 1);
    for (const name of item) found[name] = given[name] ?? shape[i] / known;
    if (item.reduce((product, name) => product * found[name], 1) !== shape[i] || !item.every((n) => Number.isInteger(found[n])))
      throw new Error(`pattern: (${item.join(" ")}) must multiply to ${shape[i]}; choose a divisor.`);
  });
  return found;
}

/** For each value, in order, the index that it has along the named axes alone. */
export function indices(p: Pattern, size: Record<string, number>, names: readonly string[]): Int32Array {
  const all = p.left.flat();
  const total = all.reduce((product, name) => product * size[name], 1);
  const found = new Int32Array(total);
  let inner = total; // values for one step of this axis and those before it
  for (const name of all) {
    inner /= size[name];
    if (!names.includes(name)) continue;
    const after = names.slice(names.indexOf(name) + 1).reduce((product, other) => product * size[other], 1);
    for (let i = 0; i < total; i++) found[i] += (Math.floor(i / inner) % size[name]) * after;
  }
  return found;
}
