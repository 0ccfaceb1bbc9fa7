"""The explorer: every interleaving of a model, by two engines over the same learned rows.

graph.py      what a search found: states, edges, first violations
rows.py       the dict engine, the reference
arrays.py     the array engine, the same search on numpy words
liveness.py   fair cycles, Always, measures: properties of the whole graph
paths.py      shortest runs with the fewest changes of actor
"""
