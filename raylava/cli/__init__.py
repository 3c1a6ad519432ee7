"""The command line: one module per command, registered in `app`. `command` runs a command with redirected output and
maps exceptions to exit statuses; `options` has the option types that commands share; `tables` renders their results.

Exit status 0 means success, 1 a failed run, 2 a mistake in the input. Results go to standard output (one JSON object
with --json), everything else to standard error. Commands import torch, transformers and Ray inside functions, so that
`--help`, `status` and `show` start quickly. The parser is typer: it is maintained, checks option types from
annotations, and needs no code per option.
"""

from raylava.cli.app import main, run_job

__all__ = ["main", "run_job"]
