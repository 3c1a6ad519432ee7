"""Many recipes at once: every variant of an experiment, under Ray Tune, each piece of work done once.

`sweep` is the sweep's file: a base recipe, axes, seeds, a search; `variants` crosses them (pure); `plan` says which
stages trials have in common and what is there already. `runner` is the driver's side: `searcher` is what Tune asks for
the next trial, `study` remembers what a search tried, `trial` walks one variant's stages within Tune and tells `board`
how far it is. `findings` reads what came of it (`outcome` is how trials end, `effects` what a level buys and how sure
one may be), `report`, `page` and `table` show it, `published` is what the paper had.
"""
