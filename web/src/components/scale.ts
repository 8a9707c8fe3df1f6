// Where things stand on a line: round numbers for its ticks, and layers for what would lie on one another.

/** About `most` round numbers between low and high. */
export function ticks(low: number, high: number, most = 8): number[] {
  const size = 10 ** Math.floor(Math.log10(high - low));
  const width = [0.1, 0.2, 0.5, 1, 2].map((k) => k * size).find((w) => (high - low) / w <= most) ?? 5 * size;
  const first = Math.ceil(low / width - 1e-9);
  return Array.from({ length: Math.max(Math.floor(high / width + 1e-9) - first + 1, 0) || 0 }, (_, i) => (first + i) * width);
}

/** A layer for each place, so that two of one layer are `apart` from each other. */
export function layers(places: readonly number[], apart: number): number[] {
  const found = new Array<number>(places.length).fill(0);
  const ends: number[] = [];
  for (const i of places.map((_, i) => i).sort((a, b) => places[a] - places[b] || a - b)) {
    let layer = ends.findIndex((end) => places[i] - end >= apart);
    if (layer < 0) layer = ends.length;
    ends[layer] = places[i];
    found[i] = layer;
  }
  return found;
}
