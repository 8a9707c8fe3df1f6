// What the page shows: one immutable state with its history, and what follows from it.

import { normalize, type Batch, type Norm, type Result } from "../kernel/normalize";
import { batchOf, cornerOf, embedded, normsFor, refusals, verify, WORKED, type ComparisonData } from "./comparison";
import { adapted, dealt, indexOf, read, rowsOf, write, type SceneId, type State } from "./hash";

const data = embedded<ComparisonData>("comparison");
const whole = data && batchOf(data);
const first = whole ?? (data ? cornerOf(data) : WORKED);

const worked: Batch = first.values.join() === WORKED.values.join() && first.shape.join() === WORKED.shape.join() ? first : WORKED;

const INITIAL: State = {
  batch: first,
  scene: embedded("recording") ? "recording" : "poke", // what one came to see
  cell: data?.cell && whole ? flatIndex(first, data.cell) : 0,
  size: Math.min(first.shape[0], 2),
  beside: [],
  steps: 1,
  momentum: 0.1,
  repair: false,
  processes: 2,
  ranks: dealt(first.shape[0]),
  pattern: "n c h w -> c",
  group: 0,
  dy: null,
  text: ["the_cat", "sat_mat"],
  padding: 2,
  change: "feature-double",
  offset: 4,
  puzzle: -1,
  hide: false,
  large: false,
};

function flatIndex(batch: Batch, cell: readonly number[]): number {
  return cell.reduce((index, at, axis) => index * batch.shape[axis] + at, 0);
}

const KEPT = 200; // steps of undo

class App {
  readonly initial = INITIAL;
  readonly data = data;
  readonly cut = data !== null && whole === null; // the batch is a corner of the one that was compared
  readonly check = data ? verify(data) : null;

  state: State = $state.raw(INITIAL);
  refused: string = $state(""); // why a link was not followed
  private past: State[] = $state.raw([]);
  private future: State[] = $state.raw([]);
  private gesture = ""; // what is being dragged: one step of undo

  private revealed: readonly SceneId[] = $state.raw([]);

  /** The batch that changes are shown against: the embedded one, or what a link brought. */
  base: Batch = $state.raw(first);

  norms: Norm[] = $derived(normsFor(data, this.state.batch));
  refusals: string[] = $derived(refusals(data, this.state.batch));
  results: Result[] = $derived(this.norms.map((norm) => normalize(this.state.batch, norm)));
  before: Result[] = $derived(this.norms.map((norm) => normalize(this.sameForm ? this.base : this.state.batch, norm)));

  /** In a lesson the outputs of a scene wait for a prediction. */
  get hidden(): boolean {
    return this.state.hide && !this.revealed.includes(this.state.scene);
  }
  reveal(): void {
    this.revealed = [...this.revealed, this.state.scene];
  }

  get canUndo(): boolean {
    return this.past.length > 0;
  }
  get canRedo(): boolean {
    return this.future.length > 0;
  }
  get rows(): number[][] {
    return rowsOf(this.state.batch);
  }
  get changed(): boolean {
    return this.state !== this.initial;
  }

  private get sameForm(): boolean {
    return this.base.shape.join() === this.state.batch.shape.join() && this.base.layout === this.state.batch.layout;
  }

  /** Change the state; changes of one `gesture` in a row are undone together. */
  set(patch: Partial<State>, gesture = ""): void {
    if (!gesture || gesture !== this.gesture) {
      this.past = [...this.past.slice(-KEPT), this.state];
      this.future = [];
    }
    this.gesture = gesture;
    this.state = patch.batch && patch.batch.shape.join() !== this.state.batch.shape.join()
      ? { ...adapted(this.state, patch.batch), ...patch }
      : { ...this.state, ...patch };
    this.save();
  }

  /** A pull ends where it is let go: the next one is undone by itself. Pins in a row stay one step. */
  settle(): void {
    if (this.gesture !== "pin") this.gesture = "";
  }

  /** Put numbers into the batch: pairs of index and value. */
  edit(values: Iterable<readonly [number, number]>, gesture = ""): void {
    const next = [...this.state.batch.values];
    for (const [i, value] of values) next[i] = value;
    this.set({ batch: { ...this.state.batch, values: next } }, gesture);
  }

  undo(): void {
    this.step("past", "future");
  }
  redo(): void {
    this.step("future", "past");
  }
  private step(from: "past" | "future", to: "past" | "future"): void {
    const next = this[from].at(-1);
    if (!next) return;
    this[to] = [...this[to], this.state];
    this[from] = this[from].slice(0, -1);
    this.gesture = "";
    this.state = next;
    this.save();
  }

  /** Back to the batch and the settings that the page came with; undo brings all back. */
  reset(): void {
    this.base = this.initial.batch;
    this.set({ ...this.initial, scene: this.state.scene, puzzle: this.state.puzzle, large: this.state.large, hide: this.state.hide });
  }

  /** A step of the tour, on the worked batch, which its task is about; undo brings all back. */
  begin(puzzle: number, scene: SceneId): void {
    this.base = worked;
    const { large, hide } = this.state;
    this.set({ ...this.initial, ...adapted(this.initial, worked), cell: 0, puzzle, scene, large, hide });
  }

  /** From here on, changes are shown against the batch as it is. */
  rebase(): void {
    this.base = this.state.batch;
  }

  get link(): string {
    return write(this.state, this.initial);
  }

  /** Follow the link in the address bar; one that makes no sense changes nothing. */
  follow(hash: string): void {
    this.refused = "";
    try {
      const state = read(hash, this.initial);
      if (write(state, this.initial) === this.link) return;
      const same = state.batch.shape.join() === this.initial.batch.shape.join() && state.batch.layout === this.initial.batch.layout;
      this.base = same ? this.initial.batch : state.batch; // a link that moved a number shows that it moved
      this.past = [...this.past, this.state];
      this.state = state;
    } catch (error) {
      this.refused = (error as Error).message;
    }
  }

  private save(): void {
    this.refused = "";
    try {
      history.replaceState(null, "", this.changed ? this.link : location.pathname + location.search);
    } catch {
      // a sandboxed frame has no history of its own; the state lives on without
    }
  }

  /** The index of the value in row r, column c of the view. */
  at(row: number, channel: number): number {
    return indexOf(this.state.batch)(row, channel);
  }

  /** The row and column of a value. */
  place(index: number): { row: number; channel: number } {
    const { shape, layout } = this.state.batch;
    const axis = layout.indexOf("c");
    const inner = shape.slice(axis + 1).reduce((a, b) => a * b, 1);
    const channel = Math.floor(index / inner) % shape[axis];
    return { row: Math.floor(index / (inner * shape[axis])) * inner + (index % inner), channel };
  }

  /** Whether the columns or the rows of the view have statistics of their own under the k-th norm. */
  frame(k: number): "row" | "column" | null {
    const { mean, group } = this.results[k];
    if (mean.length === this.rows[0].length && this.norms[k].pattern.trim().endsWith("-> c")) return "column";
    return mean.length === this.rows.length && group.every((g, i) => g === this.place(i).row) ? "row" : null;
  }

  /** The sample that a row of the view belongs to. */
  sampleOf(row: number): number {
    return Math.floor(row / (this.rows.length / this.state.batch.shape[0]));
  }
}

export const app = new App();
