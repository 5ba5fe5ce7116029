"""Job: train a checkpoint on, as `ray job submit … -- python -m pipelines.pretrain --config FILE` runs it.

The same settings and flags as `lesa-ray pretrain`; the YAML files beside this one are examples to start from.
"""

from __future__ import annotations

import sys

from lesa_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "pretrain")
    main()
