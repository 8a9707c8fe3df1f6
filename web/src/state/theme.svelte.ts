// Light or dark, as the system says or as the person chose; paper is light.

import { flushSync } from "svelte";

class Theme {
  private readonly query = matchMedia("(prefers-color-scheme: dark)");
  private system: "light" | "dark" = $state(this.query.matches ? "dark" : "light");
  chosen: "light" | "dark" | null = $state(null);
  private printing: boolean = $state(false);
  current: "light" | "dark" = $derived(this.printing ? "light" : this.chosen ?? this.system);

  constructor() {
    this.query.addEventListener("change", (event) => (this.system = event.matches ? "dark" : "light"));
    addEventListener("beforeprint", () => flushSync(() => (this.printing = true)));
    addEventListener("afterprint", () => (this.printing = false));
  }
  toggle(): void {
    this.chosen = this.current === "dark" ? "light" : "dark";
  }
}

export const theme = new Theme();
