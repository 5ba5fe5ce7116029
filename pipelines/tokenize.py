"""Job: make token blocks, as `ray job submit … -- python -m pipelines.tokenize --config FILE` runs it.

The same settings and flags as `lesa-ray tokenize`; the YAML files beside this one are examples to start from.
"""

from __future__ import annotations

import sys

from lesa_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "tokenize")
    main()
