"""A recipe's prepared corpora alone, as a job: `ray job submit --working-dir . -- python jobs/prepare.py
--recipe jobs/recipes/llava-gemma-2b.yaml --storage s3://BUCKET/raylava [key=value ...]`.
"""

import sys

from raylava.cli import job

if __name__ == "__main__":
    sys.exit(job("run", "--recipe", "--only", "prepare"))
