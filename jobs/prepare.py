"""Prepare the corpora of a recipe as a Ray job: `ray job submit --working-dir . -- python jobs/prepare.py
--recipe jobs/recipes/llava-gemma-2b.yaml --storage s3://BUCKET/raylava [key=value ...]`.
"""

import sys

from raylava.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("run", "--recipe", "--only", "prepare"))
