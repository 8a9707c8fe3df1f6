// One diverging scale for every number that is a normalized value: blue below zero, orange above, the paper at zero.
// The same as the static tables': strength grows to 3 standard deviations. Ink is dark or light by luminance.

type RGB = readonly [number, number, number];

const BELOW: RGB = [30, 110, 220];
const ABOVE: RGB = [230, 120, 20];
const FULL = 3;
const STRENGTH = { light: 0.62, dark: 0.7 };
const PAPER: Record<"light" | "dark", RGB> = { light: [255, 255, 255], dark: [24, 28, 34] };

const mix = (a: RGB, b: RGB, t: number): RGB => [0, 1, 2].map((i) => Math.round(a[i] + (b[i] - a[i]) * t)) as unknown as RGB;

function luminance(color: RGB): number {
  const [r, g, b] = color.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** The colour of a value: strongest from `full` on. */
function tone(value: number, theme: "light" | "dark", full = FULL): RGB {
  const t = Math.min(Math.abs(value) / full, 1) ** 0.8 * STRENGTH[theme];
  return mix(PAPER[theme], value < 0 ? BELOW : ABOVE, t);
}

export const fill = (value: number, theme: "light" | "dark", full: number): string =>
  Number.isFinite(value) ? `rgb(${tone(value, theme, full).join(" ")})` : "#888";

/** Background and ink of a cell. */
export function shade(value: number, theme: "light" | "dark", full = FULL): string {
  if (!Number.isFinite(value)) return "background: repeating-linear-gradient(45deg, #8884 0 3px, transparent 3px 7px)";
  const color = tone(value, theme, full);
  const ink = luminance(color) > 0.22 ? "#15181d" : "#ffffff";
  return `background: rgb(${color.join(" ")}); color: ${ink}`;
}

/** Groups of statistics: Okabe and Ito's colours, told apart by every kind of eye; after eight they repeat, lighter. */
const GROUPS: RGB[] = [[0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [213, 94, 0], [240, 228, 66], [130, 130, 130]];

export function groupColor(group: number, theme: "light" | "dark"): string {
  const base = GROUPS[group % GROUPS.length];
  const round = Math.floor(group / GROUPS.length);
  return `rgb(${mix(base, PAPER[theme], Math.min(0.18 + 0.22 * round, 0.75)).join(" ")})`;
}

/** The same, so pale that text stands on it. */
export const paleGroup = (group: number, theme: "light" | "dark"): string => groupColor((group % GROUPS.length) + 2 * GROUPS.length, theme);
