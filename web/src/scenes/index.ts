// The scenes in the order of the tour; each with its sentence, its task, and how the page sees that the task is done.

import type { Component } from "svelte";
import { firstChange, moves } from "../kernel/letters";
import { normalize } from "../kernel/normalize";
import { named } from "../kernel/norms";
import { padded } from "../kernel/padded";
import { joined, outputOf, partsOf } from "../kernel/parts";
import { after } from "../kernel/running";
import type { app as App } from "../state/app.svelte";
import { WORKED } from "../state/comparison";
import type { SceneId } from "../state/hash";
import { trained } from "../state/trained";
import Backward from "./Backward.svelte";
import Blind from "./Blind.svelte";
import Conventions from "./Conventions.svelte";
import Cube from "./Cube.svelte";
import Eval from "./Eval.svelte";
import Future from "./Future.svelte";
import Jacobian from "./Jacobian.svelte";
import Number from "./Number.svelte";
import Numerics from "./Numerics.svelte";
import Padding from "./Padding.svelte";
import Poke from "./Poke.svelte";
import Recording from "./Recording.svelte";
import Shards from "./Shards.svelte";
import Size from "./Size.svelte";

export interface Question {
  ask: string;
  choices: readonly string[];
  right: number; // index into choices
}

export interface Scene {
  id: SceneId;
  title: string; // on its tab
  component: Component;
  question: Question; // asked first, when answers are hidden
}

export interface Step {
  scene: SceneId;
  sentence: string;
  task: string;
  done: (app: typeof App) => boolean;
}

export const MAIN: readonly Scene[] = [
  {
    id: "poke", title: "Poke a neighbour", component: Poke,
    question: {
      ask: "Someone changes s3. Does the output of s0 move?",
      choices: ["Under both norms", "Under Batch Norm only", "Under Layer Norm only", "Under neither"],
      right: 1,
    },
  },
  {
    id: "number", title: "One number", component: Number,
    question: {
      ask: "Both norms turn one and the same value into two outputs. What is different?",
      choices: ["The formula", "Which values share the mean", "The size of eps"],
      right: 1,
    },
  },
  {
    id: "cube", title: "Who shares a mean", component: Cube,
    question: {
      ask: "Under which norm does one mean mix different samples?",
      choices: ["Batch Norm", "Layer Norm", "Instance Norm", "Group Norm"],
      right: 0,
    },
  },
  {
    id: "size", title: "Batch size", component: Size,
    question: {
      ask: "s0 trains in batches of two, each time beside another sample. How many outputs can its f0 have under Batch Norm?",
      choices: ["One: its own", "Two: +1 and −1", "Another one beside each sample"],
      right: 1,
    },
  },
  {
    id: "eval", title: "Train and eval", component: Eval,
    question: {
      ask: "Batch Norm trains on this one batch for ever. What does eval() then give for a sample of it?",
      choices: ["What training gives", "A little nearer to 0", "A little further from 0"],
      right: 1,
    },
  },
  {
    id: "shards", title: "Shards", component: Shards,
    question: {
      ask: "Two processes have half of the batch each. Is the average of their two variances the variance of the batch?",
      choices: ["Yes", "Yes, if the halves are equally large", "No: it lacks how far their means are apart"],
      right: 2,
    },
  },
  {
    id: "future", title: "Poke the future", component: Future,
    question: {
      ask: "Someone changes the last letter of a sequence. Do the outputs of the letters before it move?",
      choices: ["Under both norms", "Under Batch Norm only", "Under Layer Norm only", "Under neither: they came first"],
      right: 1,
    },
  },
  {
    id: "padding", title: "Padding", component: Padding,
    question: {
      ask: "Rows of zeros are added to the batch. Which outputs of the real rows keep every bit?",
      choices: ["Batch Norm and Layer Norm", "Layer Norm only", "Layer Norm, and Batch Norm with a mask", "None"],
      right: 2,
    },
  },
];

export const DEEPER: readonly Scene[] = [
  {
    id: "backward", title: "Backward", component: Backward,
    question: {
      ask: "What does a column of dx sum to under Batch Norm?",
      choices: ["What the column of dy sums to", "0", "It depends on the batch"],
      right: 1,
    },
  },
  {
    id: "jacobian", title: "Jacobian", component: Jacobian,
    question: {
      ask: "Under which norm does an input of one sample move an output of another?",
      choices: ["Both", "Batch Norm only", "Layer Norm only", "Neither"],
      right: 1,
    },
  },
  {
    id: "blind", title: "Blind spots", component: Blind,
    question: {
      ask: "Someone adds 5 to every number of one sample. Which norm notices?",
      choices: ["All three", "Batch Norm and RMSNorm", "Batch Norm only", "Layer Norm only"],
      right: 1,
    },
  },
  {
    id: "conventions", title: "Conventions", component: Conventions,
    question: {
      ask: "Momentum 0.99: how much of the new batch enters the running mean in Keras, and how much in PyTorch?",
      choices: ["1 % in both", "99 % in both", "1 % in Keras, 99 % in PyTorch", "99 % in Keras, 1 % in PyTorch"],
      right: 2,
    },
  },
  {
    id: "numerics", title: "Numerics", component: Numerics,
    question: {
      ask: "Every value of a feature grows by 10,000. What becomes of E[x²] − E[x]² in float32?",
      choices: ["It stays the variance", "It is a little off", "It may be negative"],
      right: 2,
    },
  },
  {
    id: "recording", title: "Recording", component: Recording,
    question: {
      ask: "After a thousand steps, are Batch Norm's running statistics those of the last batch?",
      choices: ["Yes", "No: they are a fading mean over many batches", "No: they are the mean over all batches"],
      right: 1,
    },
  },
];

export const scene = (id: SceneId): Scene => [...MAIN, ...DEEPER].find((s) => s.id === id) ?? MAIN[0];

const untouched = (app: typeof App, sample: number): boolean => {
  const { shape, values } = app.state.batch;
  const each = values.length / shape[0];
  return shape.join() === WORKED.shape.join()
    && values.slice(sample * each, (sample + 1) * each).every((v, i) => v === WORKED.values[sample * each + i]);
};

const output = (app: typeof App, norm: string, index: number): number =>
  app.results[app.norms.findIndex((n) => n.name === norm)]?.y[index] ?? NaN;

export const TOUR: readonly Step[] = [
  {
    scene: "poke",
    sentence: "Rows are samples, columns are features. Batch Norm takes one mean for each column, Layer Norm one for each row.",
    task: "Change any number, and watch which outputs follow it.",
    done: (app) => app.state.batch.values.some((v, i) => v !== WORKED.values[i]),
  },
  {
    scene: "poke",
    sentence: "Under Batch Norm your output depends on who else is in the batch. Under Layer Norm it cannot.",
    task: "Make the Batch Norm output of s0, f0 change sign without touching s0.",
    done: (app) => untouched(app, 0) && output(app, "batch_norm", 0) > 0,
  },
  {
    scene: "number",
    sentence: "An output is 0 exactly where its input equals the mean that it is compared with.",
    task: "Click an output that is 0 under Layer Norm. Then change another number so that it is 0 under Batch Norm too.",
    done: (app) => app.results.every(({ xhat, var: variance, group }) => {
      const i = app.state.cell;
      return Math.abs(xhat[i]) < 1e-9 && variance[group[i]] > 0;
    }),
  },
  {
    scene: "cube",
    sentence: "A norm is the choice of the axes that keep a mean of their own. All else follows.",
    task: "Make Instance Norm out of Batch Norm by ticking one more axis.",
    done: (app) => /^n c .*-> (n c|c n)$/.test(app.state.pattern.trim()),
  },
  {
    scene: "size",
    sentence: "The fewer samples share a mean, the more the company decides. Layer Norm needs no company.",
    task: "Find the batch of two in which s0, f0 comes out above 0 under Batch Norm.",
    done: (app) => untouched(app, 0) && app.state.cell === 0 && app.state.size === 2 && app.state.beside.length === 1
      && app.state.batch.values[0] > app.state.batch.values[app.state.beside[0] * app.state.batch.shape[1]],
  },
  {
    scene: "eval",
    sentence: "In eval, Batch Norm uses means remembered from training. Remembering takes time, and never gives quite what training gave.",
    task: "By training alone, without the repair, bring eval's s0, f0 to within 0.1 of what training gives. Can you reach 0.05?",
    done: (app) => {
      const { norm, result } = trained(app, "batch_norm");
      const running = after(app.state.steps, app.state.momentum, result.mean, result.var, result.m);
      const found = outputOf(norm, 0, app.state.batch.values[0], { mean: running.mean[0], var: running.var[0] });
      return untouched(app, 0) && !app.state.repair && Math.abs(found - result.y[0]) < 0.1;
    },
  },
  {
    scene: "shards",
    sentence: "On several processes, the mean of the variances is not the variance: it lacks how far the means lie apart.",
    task: "Deal the four samples so that the averaged variance of f0 is as small as it can be.",
    done: (app) => {
      const { norm, result } = trained(app, "batch_norm");
      const parts = partsOf(app.state.batch, norm, result, 0);
      const ranks = [0, 1].map((rank) => joined(parts.filter((_, s) => app.state.ranks[s] === rank)));
      return untouched(app, 0) && ranks.every((r) => r.count > 1) && ranks.reduce((sum, r) => sum + r.var, 0) / 2 <= 0.25;
    },
  },
  {
    scene: "future",
    sentence: "With Batch Norm a model that reads from left to right has seen what comes next: the mean is taken over all positions.",
    task: "Change nothing but the last letter of the_cat, so that the output of its first letter moves by more than 0.15.",
    done: ({ state: { text }, initial }) =>
      text.length === initial.text.length && text[0].length === initial.text[0].length
      && firstChange(initial.text, text).join() === [text[0].length - 1, ...text.slice(1).map((word) => word.length)].join()
      && moves(named("batch_norm", "nlc"), initial.text, text)[0].size > 0.15,
  },
  {
    scene: "padding",
    sentence: "Padding is data to Batch Norm, until a mask says that it is none.",
    task: "Leave the batch as it is, and pad it until the Batch Norm output of s0, f0 is above 0.5.",
    done: (app) => WORKED.values.every((v, i) => v === app.state.batch.values[i]) && untouched(app, 0)
      && normalize(padded(WORKED, app.state.padding).batch, named("batch_norm", "nc")).y[0] > 0.5,
  },
];
