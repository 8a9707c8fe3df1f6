// Which part of a large batch the tables show: all tables of a scene the same part.

export const ROWS = 16;
export const COLUMNS = 8;

/** Where a part of `size` begins so that `at` is in it, moved no further than it must. */
const around = (start: number, at: number, size: number): number => (at < start ? at : at >= start + size ? at - size + 1 : start);

/** The indices of `size` neighbours from `start`, of `all` there are. */
const part = (start: number, size: number, all: number): number[] => {
  const first = Math.min(start, Math.max(all - size, 0));
  return Array.from({ length: Math.min(size, all) }, (_, i) => first + i);
};

class View {
  top = $state(0);
  left = $state(0);

  rows(all: number): number[] {
    return part(this.top, ROWS, all);
  }
  columns(all: number): number[] {
    return part(this.left, COLUMNS, all);
  }
  show(row: number, column: number): void {
    this.top = around(this.top, row, ROWS);
    this.left = around(this.left, column, COLUMNS);
  }
}

export const view = new View();
