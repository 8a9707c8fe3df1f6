// The variance as a float32 kernel computes it: each operation rounded, sums in order.

const f = Math.fround;

export interface Moments32 {
  mean: number;
  var: number;
}

/** E[x²] − E[x]²: both sums in one pass, and nearly all digits cancel when the mean is large. */
export function onePass(x: readonly number[]): Moments32 {
  let [sum, squares] = [0, 0];
  for (const v of x) {
    sum = f(sum + v);
    squares = f(squares + f(v * v));
  }
  const mean = f(sum / x.length);
  return { mean, var: f(f(squares / x.length) - f(mean * mean)) };
}

/** About the first value, an anchor that takes the large part out exactly; then centred on the mean of what is left. */
export function anchored(x: readonly number[]): Moments32 {
  const d = x.map((v) => f(v - x[0]));
  const shift = f(d.reduce((sum, v) => f(sum + v), 0) / x.length);
  const squares = d.reduce((sum, v) => {
    const c = f(v - shift);
    return f(sum + f(c * c));
  }, 0);
  return { mean: f(x[0] + shift), var: f(squares / x.length) };
}
