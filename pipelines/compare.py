"""Job: a comparison of ways to grow a base, as `lesa-ray submit -- python -m pipelines.compare FILE` runs it.

The same as `lesa-ray compare`; the YAML file beside this one is an example to start from, those in `studies/` others.
"""

from __future__ import annotations

import sys

from lesa_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "compare")
    main()
