import type { Batch } from "./normalize";

/** The batch with `rows` samples of zeros at its end, and which values are real. */
export function padded(batch: Batch, rows: number): { batch: Batch; valid: number[] } {
  const each = batch.values.length / batch.shape[0];
  const zeros = new Array<number>(rows * each).fill(0);
  return {
    batch: { ...batch, shape: [batch.shape[0] + rows, ...batch.shape.slice(1)], values: [...batch.values, ...zeros] },
    valid: [...batch.values.map(() => 1), ...zeros],
  };
}
