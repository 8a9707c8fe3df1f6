// What can be taken along: code, numbers, a picture, the page itself.

import { shade } from "../components/color";
import { app } from "./app.svelte";
import { rowsOf } from "./hash";
import { columnNames, output, rowNames, short } from "./words";

/** The page as it arrived, before it unpacked or drew anything. */
const source = ((): string => {
  const page = document.documentElement.cloneNode(true) as HTMLElement;
  for (const element of page.querySelectorAll("[data-unpacked]")) element.remove();
  return `<!doctype html>\n${page.outerHTML}`;
})();

/** The page as a file that opens in the state of `link`. */
export function pageWith(link: string): string {
  const state = `<script type="application/json" id="state">${JSON.stringify(link).replace(/</g, "\\u003c")}</script>`;
  return source.replace(/<script type="application\/json" id="state">.*?<\/script>\n?/, "").replace(/(<script type="application\/json" id="comparison">)/, `${state}\n$1`);
}

/** PyTorch that computes what the page shows. */
export function asPyTorch(): string {
  const { batch } = app.state;
  const tensor = (values: readonly number[] | null): string => `torch.tensor(${JSON.stringify(values)}, dtype=torch.float64)`;
  const lines = [
    "import torch",
    "import normwise as nw",
    "",
    `x = ${tensor(batch.values)}.reshape(${batch.shape.join(", ")})`,
  ];
  const axis = batch.layout.indexOf("c");
  const last = axis === batch.layout.length - 1;
  const along = (values: readonly number[]): string => `${tensor(values)}.reshape(${[...batch.layout].map((letter) => (letter === "c" ? -1 : 1)).join(", ")})`;
  for (const norm of app.norms) {
    const [weight, bias] = [norm.weight ? `weight=${tensor(norm.weight)}` : "", norm.bias ? `bias=${tensor(norm.bias)}` : ""];
    const sizes = Object.entries(norm.given).map(([name, n]) => `${name}=${n}`);
    const call = norm.running
      ? `(x - ${along(norm.running.mean)}) / (${along(norm.running.var)} + ${norm.eps}).sqrt()`
        + `${norm.weight ? ` * ${along(norm.weight)}` : ""}${norm.bias ? ` + ${along(norm.bias)}` : ""}  # eval`
      : norm.centred
        ? `nw.functional.normalize(${["x", `"${norm.pattern}"`, `affine="${norm.affine}"`, weight, bias, `eps=${norm.eps}`, ...sizes].filter(Boolean).join(", ")})`
        : `nw.functional.rms_norm(${[last ? "x" : `x.movedim(${axis}, -1)`, `(${batch.shape[axis]},)`, weight, `eps=${norm.eps}`].filter(Boolean).join(", ")})${last ? "" : `.movedim(-1, ${axis})`}`;
    lines.push(`${norm.name} = ${call}`, `print(${norm.name})`);
  }
  return `${lines.join("\n")}\n`;
}

/** Every number on the page, in full. */
export function asJson(): string {
  const { batch } = app.state;
  return JSON.stringify({
    schema: "normwise.page", version: 1, link: app.link, batch,
    norms: app.norms.map((norm, k) => {
      const { y, xhat, mean, var: variance, rstd } = app.results[k];
      const list = (values: Float64Array) => Array.from(values, (v) => (Number.isFinite(v) ? v : String(v)));
      return { ...norm, statistics: { mean: list(mean), var: list(variance), rstd: list(rstd) }, xhat: list(xhat), y: list(y) };
    }),
  }, null, 2);
}

const escape = (text: string): string => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

/** Input and outputs as heat maps side by side. */
export function asSvg(): string {
  const { batch } = app.state;
  const [rows, columns] = [rowNames(batch).slice(0, 32), columnNames(batch).slice(0, 16)];
  const [cell, line, left, top] = [62, 26, 56, 58];
  const width = left + columns.length * cell + 24;
  const tables = [
    { title: "Input", pattern: "", values: app.rows, text: (v: number) => short(v), colored: false },
    ...app.norms.map((norm, k) => ({
      title: norm.title, pattern: norm.pattern, values: rowsOf({ ...batch, values: Array.from(app.results[k].y) }), text: (v: number) => output(v), colored: true,
    })),
  ];
  const drawn = tables.map((t, k) => {
    const x = k * width;
    const heads = columns.map((name, c) => `<text x="${x + left + c * cell + cell / 2}" y="${top - 8}" text-anchor="middle" fill="#565d68">${escape(name)}</text>`);
    const cells = rows.flatMap((name, r) => {
      const y = top + r * line;
      return [
        `<text x="${x + left - 10}" y="${y + 17}" text-anchor="end" fill="#565d68">${escape(name)}</text>`,
        ...columns.map((_, c) => {
          const v = t.values[r][c];
          const style = t.colored && Number.isFinite(v) ? shade(v, "light") : "background: #fbfaf7; color: #15181d";
          const [fill, ink] = [/background: ([^;]+)/.exec(style)![1], /[^-]color: ([^;]+)/.exec(style)![1]];
          return `<rect x="${x + left + c * cell}" y="${y}" width="${cell - 2}" height="${line - 2}" rx="4" fill="${fill}"/>` +
            `<text x="${x + left + c * cell + cell - 8}" y="${y + 17}" text-anchor="end" fill="${ink}">${t.text(v)}</text>`;
        }),
      ];
    });
    return `<text x="${x + left}" y="22" font-size="16" font-weight="600">${escape(t.title)} <tspan font-weight="400" font-size="12" fill="#565d68">${escape(t.pattern)}</tspan></text>${heads.join("")}${cells.join("")}`;
  });
  const [w, h] = [tables.length * width, top + rows.length * line + 16];
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" viewBox="0 0 ${w} ${h}" font-family="system-ui, sans-serif" font-size="13"><rect width="${w}" height="${h}" fill="#ffffff"/>${drawn.join("")}</svg>\n`;
}

/** The same as pixels, twice as fine. */
export async function png(): Promise<Blob> {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(asSvg())}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width * 2, image.height * 2];
  canvas.getContext("2d")!.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(blob!), "image/png"));
}

/** Hand a file to the browser's downloads. */
export function save(name: string, type: string, content: string | Blob): void {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const anchor = Object.assign(document.createElement("a"), { href: url, download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
