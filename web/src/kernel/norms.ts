// The norms that the page knows by name, for any layout; the patterns are those of definitions.py.

import type { Norm } from "./normalize";

const GENERAL: Record<string, { title: string; kept: string; centred?: boolean }> = {
  batch_norm: { title: "Batch Norm", kept: "c" },
  layer_norm: { title: "Layer Norm", kept: "n ..." },
  rms_norm: { title: "RMSNorm", kept: "n ...", centred: false },
  group_norm: { title: "Group Norm", kept: "n g" },
  instance_norm: { title: "Instance Norm", kept: "n c" },
};

export type NormName = keyof typeof GENERAL;

/** A norm by its name, at a layout such as "nchw", with weight 1 and bias 0. */
export function named(name: NormName, layout: string, groups = 1, eps = 1e-5): Norm {
  const { title, kept, centred = true } = GENERAL[name];
  const split = name === "group_norm";
  const left = [...layout].map((axis) => (axis === "c" && split ? "(g c)" : axis)).join(" ");
  const positions = [...layout].filter((axis) => !"nc".includes(axis)).join(" ");
  const right = kept.replace("...", positions).trim();
  return {
    name, title, pattern: `${left} -> ${right}`, affine: split ? "(g c)" : "c", centred, eps,
    given: split ? { g: groups } : {}, weight: null, bias: null, running: null,
  };
}
