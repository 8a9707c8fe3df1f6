// Running statistics, as torch keeps them: r becomes (1 - momentum) r + momentum * new; the variance is the unbiased one.

export interface Running {
  mean: number[];
  var: number[];
}

/** After `steps` training steps on one batch, from mean 0 and variance 1. */
export function after(steps: number, momentum: number, mean: ArrayLike<number>, biased: ArrayLike<number>, m: number): Running {
  const share = steps === 0 ? 0 : 1 - (1 - momentum) ** steps;
  const unbiased = Array.from(biased, (v) => (m > 1 ? (v * m) / (m - 1) : v));
  return {
    mean: Array.from(mean, (v) => share * v),
    var: unbiased.map((v) => 1 - share + share * v),
  };
}

/** The same with the share of the starting values, (1 - momentum)^steps, taken out again. */
export function repaired(running: Running, steps: number, momentum: number): Running {
  const b = (1 - momentum) ** steps;
  return { mean: running.mean.map((v) => v / (1 - b)), var: running.var.map((v) => (v - b) / (1 - b)) };
}
