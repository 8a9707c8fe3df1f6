// A training run's statistics (normwise.record) or an experiment's result, checked before it is shown.

export interface Layer {
  name: string;
  kind: string;
  channels: number[];
  mean: number[][]; // for each step, for each channel
  var: number[][];
  running_mean: number[][] | null;
  running_var: number[][] | null;
}
export interface Recording { schema: "normwise.recording"; model: string; steps: number[]; layers: Layer[] }
export interface Effect { label: string; value: number; low: number; high: number; unit: string }
export interface Result { schema: "normwise.lab"; name: string; claim: string; verdict: string; effects: Effect[] }

/** A file of `normwise lab run`: the effect of its contrast, and the others beside it. */
interface LabFile {
  experiment: string;
  claim: string;
  verdict: string;
  contrast: { text: string };
  finding: { effect: Omit<Effect, "label">; others: Record<string, Omit<Effect, "label">> };
}

const LARGEST = 20_000_000; // characters

/** What a file says; throws one sentence if it is neither. */
export function read(text: string): Recording | Result {
  if (text.length > LARGEST) throw new Error(`recording: it may have ${LARGEST} characters; got ${text.length}; record fewer steps with every=.`);
  let data: unknown;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("recording: it must be JSON; got something else; write it with recording.save(path).");
  }
  return checked(data);
}

/** The same for what the page embeds. */
export function checked(data: unknown): Recording | Result {
  const file = data as Partial<LabFile>;
  const lab = data as Partial<Result>;
  if (typeof file?.experiment === "string" && file.finding?.effect) {
    const all = { [String(file.contrast?.text ?? file.experiment)]: file.finding.effect, ...file.finding.others };
    return result(file.experiment, file, Object.entries(all).map(([label, effect]) => ({ ...effect, label })));
  }
  if (lab?.schema === "normwise.lab" && Array.isArray(lab.effects)) return result(String(lab.name), lab, lab.effects);
  const found = data as Partial<Recording>;
  if (found?.schema !== "normwise.recording" || !Array.isArray(found.steps) || !Array.isArray(found.layers))
    throw new Error("recording: it must be a file of recording.save(path) or of normwise lab run; got another; write one of them.");
  const steps = found.steps.map(Number);
  const table = (values: unknown, layer: Layer, what: string): number[][] => {
    const rows = Array.isArray(values) ? values : [];
    if (rows.length !== steps.length || rows.some((row) => !Array.isArray(row) || row.length !== layer.channels.length))
      throw new Error(`recording: ${what} of ${layer.name} must have ${steps.length} steps of ${layer.channels.length} channels; it has not; record it again.`);
    return rows.map((row: unknown[]) => row.map(Number));
  };
  if (found.layers.some((layer) => !Array.isArray(layer?.channels))) throw new Error("recording: each layer must have its channels; one has none; record it again.");
  const layers = found.layers.map((layer) => ({
    name: String(layer.name), kind: String(layer.kind), channels: layer.channels,
    mean: table(layer.mean, layer, "mean"), var: table(layer.var, layer, "var"),
    running_mean: layer.running_mean && table(layer.running_mean, layer, "running_mean"),
    running_var: layer.running_var && table(layer.running_var, layer, "running_var"),
  }));
  return { schema: "normwise.recording", model: String(found.model), steps, layers };
}

const result = (name: string, said: { claim?: unknown; verdict?: unknown }, effects: readonly Effect[]): Result => ({
  schema: "normwise.lab", name, claim: String(said.claim), verdict: String(said.verdict),
  effects: effects.map((e) => ({ label: String(e.label), value: Number(e.value), low: Number(e.low), high: Number(e.high), unit: String(e.unit ?? "") })),
});
