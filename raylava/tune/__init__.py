"""Sweeps and searches: all variants of an experiment under Ray Tune, each distinct stage built once.

Configuration and planning: `sweep` is the typed sweep file, `variants` expands it into recipes (pure), `sweep_plan`
determines which stages variants share and which artifacts exist. Execution: `runner` is the driver, `searcher` connects
it to Ray Tune, `study` stores the trials of a search, `trial` runs the stages of one variant and reports to the
`tracker`. Results: `results` reads the artifacts, `effects` estimates what each level contributes, `report`,
`html_report` and `tables` present them.
"""
