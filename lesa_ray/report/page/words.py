"""Numbers and lists as words, for the sentences of the page."""

from __future__ import annotations

from collections.abc import Sequence

from lesa_ray.comparison.statistics import Difference, Spread

_UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6))


def called(name: str) -> str:
    """A name as it stands in a sentence: in quotation marks if it has a comma of its own."""
    return f"“{name}”" if "," in name else name


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    names = [called(name) for name in names]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def some(names: Sequence[str], most: int = 6) -> str:
    """As `listed`, but the first few and how many more."""
    return listed(names) if len(names) <= most else listed([*names[: most - 1], f"{len(names) - most + 1} more"])


def spread_words(found: Spread) -> str:
    """2.6636 (SD 0.0012): on the page what follows ± is half of an interval."""
    return f"{found.mean:.4f}" + (f" (SD {found.sd:.4f})" if found.sd else "")


def difference_words(found: Difference) -> str:
    """+0.0031 ± 0.0010 (the half of the 95 % interval)."""
    return f"{signed(found.mean)}" + ("" if found.half is None else f" ± {found.half:.4f}")


def signed(value: float, digits: int = 4) -> str:
    """With its sign, a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(share: float) -> str:
    """0.483 → 48 %."""
    return f"{100 * share:.0f} %"


def plural(count: int, noun: str) -> str:
    """1 seed, 3 seeds."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def big(value: float) -> str:
    """Tokens or parameters for people: 530,000; 1.72 B; 15 T."""
    if value < 1e6:
        return f"{value:,.0f}"
    unit, scale = next((unit, scale) for unit, scale in _UNITS if value >= 0.9995 * scale)  # 999.6 M is 1 B
    return f"{value / scale:.3g} {unit}"


def short_type(name: str) -> str:
    """A weight type as people say it: self_attn.q_proj.weight → q_proj; experts keep their number, or that they are
    experts."""
    whole, inside, item = name.partition("[")  # all experts may lie in one tensor
    parts = whole.removesuffix(".weight").split(".")
    if inside:
        return f"experts.{parts[-1]}" if item == "*]" else f"{parts[-1]}[{item}"
    if any(part.isdigit() for part in parts):
        return ".".join(parts[-2:])
    if kinds := [part for part in parts[:-1] if "expert" in part]:
        return f"{kinds[-1]}.{parts[-1]}"
    return parts[-1] if parts[-1] not in ("dense", "c_proj", "c_attn", "c_fc") else ".".join(parts[-2:])
