// Light or dark, as the system says or as the person chose; and whether things may move.

class Theme {
  private readonly query = matchMedia("(prefers-color-scheme: dark)");
  private system: "light" | "dark" = $state(this.query.matches ? "dark" : "light");
  chosen: "light" | "dark" | null = $state(null);
  current: "light" | "dark" = $derived(this.chosen ?? this.system);

  constructor() {
    this.query.addEventListener("change", (event) => (this.system = event.matches ? "dark" : "light"));
  }
  toggle(): void {
    this.chosen = this.current === "dark" ? "light" : "dark";
  }
}

export const theme = new Theme();
