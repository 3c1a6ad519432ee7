"""Every variant of a sweep, as a job: `ray job submit --working-dir . -- python jobs/sweep.py
--sweep jobs/recipes/ablations.yaml --storage s3://BUCKET/raylava [key=value ...]`.
"""

import sys

from raylava.cli import job

if __name__ == "__main__":
    sys.exit(job("sweep", "--sweep"))
