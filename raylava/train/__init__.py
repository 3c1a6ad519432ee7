"""Train a stage on prepared blocks with DeepSpeed ZeRO, under Ray Train or torchrun.

`trainer` is the training loop of one rank. It reads steps from `data_loader`, which follows `batch_plan` (pure: the
samples of each step, packed for each rank), computes them with `engine` (DeepSpeed), saves through `checkpoints`, and
records them in `step_log` (what was computed) and `metrics` (how fast). It runs on a `backend`: `ray` or
`torchrun_backend`. `spec` is the serializable description of a stage; `auto` resolves `auto` settings from
`sampled_steps`; `replay` recomputes a non-finite step sample by sample.
"""
