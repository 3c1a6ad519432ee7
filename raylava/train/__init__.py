"""Blocks → weights, by DeepSpeed under Ray Train.

`spec` is what one stage is to do. `plan` says which samples form each step and who computes them (pure); `feed` turns
the plan's packs into tensors ahead of need; `engine` wraps DeepSpeed, `writer` writes its checkpoints behind the step's
back, `saver` decides when and `upload` takes them to storage; `ledger` is the proof of what was done;
`figures`, `telemetry` and `trackers` are what people see of a run; `replay` looks at a step that went wrong. `loop` is
one rank's way through all of these. It knows its `host` only: Ray's is `worker`, with `trainer` and `watch` on the
driver's side (scaling, failures, progress); `alone` is the one without Ray.
"""
