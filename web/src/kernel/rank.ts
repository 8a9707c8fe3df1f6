/** The rank of a matrix by elimination with complete pivoting: pivots up to `tolerance` count as 0. */
export function rank(matrix: readonly (readonly number[])[], tolerance: number): number {
  const a = matrix.map((row) => [...row]);
  if (!a.flat().every(Number.isFinite)) return NaN;
  const n = a.length;
  for (let k = 0; k < n; k++) {
    let [p, q] = [k, k];
    for (let i = k; i < n; i++) for (let j = k; j < n; j++) if (Math.abs(a[i][j]) > Math.abs(a[p][q])) [p, q] = [i, j];
    if (Math.abs(a[p][q]) <= tolerance) return k;
    [a[k], a[p]] = [a[p], a[k]];
    for (const row of a) [row[k], row[q]] = [row[q], row[k]];
    for (let i = k + 1; i < n; i++) {
      const factor = a[i][k] / a[k][k];
      for (let j = k; j < n; j++) a[i][j] -= factor * a[k][j];
    }
  }
  return n;
}
