"""Analytic model of one training step: parameters, FLOPs, memory, traffic, time, and a search over execution configs.

All functions are pure: they take configurations and shapes, load no weights and import neither torch nor Ray.

- `shapes`: dimensions and exact parameter counts of a language model, a vision tower and the connector.
- `flops`: FLOPs of a step, forward and backward, by model part.
- `memory`: peak memory of one device, as a table of named terms and phases.
- `traffic`: bytes that a step's collectives move.
- `hardware`: GPU data sheets, clusters and price tables.
- `step_time`: seconds of a step on the slowest worker.
- `search`: enumerates execution configs, predicts each one and selects the fastest that fits.

`raylava.train` resolves its `auto` settings with this package; `raylava.estimate` predicts whole recipes with it.
"""
