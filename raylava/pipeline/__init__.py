"""A recipe as a graph of stages, each of which produces one artifact.

`stage` is the interface of a stage and how its artifact is found, awaited or built; `stages` has the stage types and
`evaluation` the one that evaluates a model; `graph` expands a recipe into stages; `runner` runs what is missing;
`status` lists artifacts in storage; `results` reads scores and `report` displays them; `run_report` is the HTML page
of a run.
"""
