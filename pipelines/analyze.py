"""Job: a look at a checkpoint's weights, as `lesa-ray submit -- python -m pipelines.analyze --config FILE` runs it.

The same settings and flags as `lesa-ray analyze`; the YAML file beside this one is an example to start from.
"""

from __future__ import annotations

import sys

from lesa_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "analyze")
    main()
