// One file, which works from disk and without a network: script and style inlined and packed, and a policy that allows nothing else.
import { createHash } from "node:crypto";
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { gzipSync, strToU8 } from "fflate";
import { defineConfig, type Plugin } from "vite";
import { viteSingleFile } from "vite-plugin-singlefile";

const hash = (script: string): string => `'sha256-${createHash("sha256").update(script, "utf8").digest("base64")}'`;

// fflate packs to the same bytes on every machine; the zlib of Node does not.
const packed = (text: string): string => Buffer.from(gzipSync(strToU8(text), { level: 9, mem: 12, mtime: 0 })).toString("base64");

const LOADER = `for (const [id, tag] of [["packed-style", "style"], ["packed-script", "script"]]) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const element = document.createElement(tag);
  if (tag === "script") element.type = "module";
  element.dataset.unpacked = "";
  element.textContent = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(element);
}`;

/** Packs the inlined script and style, which a loader unpacks; the policy names both scripts by their hashes. */
function pack(): Plugin {
  return {
    name: "pack",
    enforce: "post",
    generateBundle: {
      order: "post",
      handler(_, bundle) {
        for (const file of Object.values(bundle)) {
          if (file.type !== "asset" || !file.fileName.endsWith(".html")) continue;
          const page = String(file.source);
          const script = /<script type="module"[^>]*>([\s\S]*?)<\/script>/.exec(page);
          const style = /<style[^>]*>([\s\S]*?)<\/style>/.exec(page);
          if (!script || !style) throw new Error("the page must have one inlined script and one style; it has not; look at vite-plugin-singlefile.");
          const element = (id: string, text: string): string => `<script type="application/gzip" id="${id}">${packed(text)}</script>`;
          file.source = page
            .replace(script[0], () => "")
            .replace(style[0], () => "")
            .replace("'sha256-of-the-scripts'", `${hash(LOADER)} ${hash(script[1])}`)
            .replace("</body>", () => `${element("packed-style", style[1])}\n${element("packed-script", script[1])}\n<script type="module">${LOADER}</script>\n</body>`);
        }
      },
    },
  };
}

export default defineConfig({
  plugins: [svelte(), viteSingleFile({ removeViteModuleLoader: true }), pack()],
  build: {
    outDir: "../build/page", emptyOutDir: true, modulePreload: { polyfill: false }, target: "es2022",
    rolldownOptions: { checks: { pluginTimings: false } },
  },
});
