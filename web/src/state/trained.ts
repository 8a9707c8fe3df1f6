// Batch Norm and Layer Norm as they train, also where the comparison shows them in eval or without one of them.

import { normalize, type Norm, type Result } from "../kernel/normalize";
import { named } from "../kernel/norms";
import type { app as App } from "./app.svelte";

export function trained(app: typeof App, name: "batch_norm" | "layer_norm"): { norm: Norm; result: Result } {
  const { batch } = app.state;
  const norm = { ...(app.norms.find((n) => n.name === name) ?? named(name, batch.layout)), running: null };
  return { norm, result: normalize(batch, norm) };
}
