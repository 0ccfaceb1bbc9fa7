"""The machine that a scenario runs on: its cells and their table, what never changes, what must never happen."""
