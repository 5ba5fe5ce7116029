"""Job: a fleet of model families, as `lesa-ray submit -- python -m pipelines.fleet FILE` runs it on a Ray cluster.

The same as `lesa-ray fleet`; the YAML file beside this one is an example to start from.
"""

from __future__ import annotations

import sys

from lesa_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "fleet")
    main()
