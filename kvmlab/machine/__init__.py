"""The machine that a scenario runs on: its cells, what never changes, what must never happen."""
