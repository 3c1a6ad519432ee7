"""The commands. `entry` parses a command line and runs one; what the commands share is in `command`; the commands
themselves are in `making` (recipes into artifacts), `scores`, `clusters` and `looking` (what was made), each beside its
options.

Exit status 0 when it worked, 1 when a run failed, 2 when what was given is wrong. Results go to standard output (one
JSON object with --json), everything else to standard error.
"""

from raylava.cli.entry import job, main

__all__ = ["job", "main"]
