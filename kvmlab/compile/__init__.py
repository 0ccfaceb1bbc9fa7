"""From the text of a design and a scenario to the programs of a model."""
