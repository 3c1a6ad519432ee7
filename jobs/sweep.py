"""Run all variants of a sweep as a Ray job: `ray job submit --working-dir . -- python jobs/sweep.py
--sweep jobs/recipes/ablations.yaml --storage s3://BUCKET/raylava [key=value ...]`.
"""

import sys

from raylava.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("sweep", "--sweep"))
