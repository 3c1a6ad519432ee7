"""Blocks → weights, by DeepSpeed under Ray Train.

`job` is what one stage is to do. `plan` says which samples form each step and who computes them (pure); `feed` turns
the plan's packs into tensors ahead of need; `engine` wraps DeepSpeed and knows nothing of Ray, `writer` writes its
checkpoints behind the step's back and `upload` takes them to storage; `flops`, `telemetry` and `watch` are what people
see of a run; `replay` looks at a step that went wrong. `worker` is one worker's loop over all of these; `trainer` is
the driver's side: scaling, failures, progress.
"""
