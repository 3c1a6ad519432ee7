"""Blocks → weights, by DeepSpeed under Ray Train.

`plan` says which samples form each step and who computes them (pure); `feed` turns the plan's packs into tensors ahead
of need; `engine` wraps DeepSpeed and knows nothing of Ray; `worker` is one worker's loop over the three; `trainer` is
the driver's side: scaling, failures, progress.
"""
