"""The explorer: every interleaving of a model, by two engines over the same learned rows.

graph.py      what a search found: states, edges, first violations
rows.py       the dict engine, the reference
arrays.py     the array engine, the same search on numpy words; it uses
  tables.py     learned rows, looked up for all actors at once
  dedup.py      the exact set of known states
  levels.py     a search too large to keep its edges
liveness.py   fair cycles, Always, measures: properties of the whole graph
paths.py      shortest runs with the fewest changes of actor
ranges.py     the range engine: the same rows on millions of pages, for the emulator
"""
