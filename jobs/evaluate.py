"""Evaluate a model as a Ray job: `ray job submit --working-dir . -- python jobs/evaluate.py
--model s3://BUCKET/raylava/finetune/FINGERPRINT --benchmark pope --data s3://BUCKET/pope --storage s3://BUCKET/raylava`.
"""

import sys

from raylava.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("evaluate", "--model"))
