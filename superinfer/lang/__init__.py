"""The language: what a person writes to program a model, and how it runs. Its public names are in `superinfer`."""
