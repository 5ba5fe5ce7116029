"""Plain copies: each new layer is its lower neighbour as it is. The control for methods that make something of it.

It differs from LLaMA Pro in that nothing is zeroed, and from SOLAR in that copies stand beside their originals. Nothing
is computed: it costs the copying of the files.
"""

from __future__ import annotations

from lesa_ray.expansion.method import Job, Method, Unit


class CopyLower(Method):
    name = "copy"
    title = "copies of the lower neighbour (a control)"
    position = "top"
    zero_init = False
    vectors = "lower"
    copies = True
    draws = False

    def units(self, job: Job) -> list[Unit]:
        return []
