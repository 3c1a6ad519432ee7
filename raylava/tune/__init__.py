"""Many recipes at once: every variant of an experiment, under Ray Tune, each piece of work done once.

`sweep` is the sweep's file: a base recipe, axes, seeds; `variants` crosses them (pure); `plan` says which stages the
variants have in common and what is there already; `trial` walks one variant's stages within Ray Tune; `board` is where
trials tell how far they are; `runner` is the driver's side. `table` and `report` show what came of it, `effects` says
what an axis buys and how sure one may be (pure).
"""
