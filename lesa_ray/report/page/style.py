"""The page's CSS: a column for reading, figures as wide as the window, light, dark and print."""

from __future__ import annotations

from lesa_ray.report.page.palette import BACKGROUND, DARK, LIGHT, variables

_SANS = 'system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", sans-serif'
_MONO = 'ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace'
_DARK_RULES = f":root {{ --page: {BACKGROUND['dark']}; --soft: #1d232a; --link: #62aef5; {variables(DARK)} }}"

STYLE = f"""
:root {{
  color-scheme: light dark; --figure-font: "Helvetica Neue", Arial, "Liberation Sans", "DejaVu Sans", sans-serif;
  --page: {BACKGROUND["light"]}; --soft: #f4f6f8; --link: #0a62a8; {variables(LIGHT)}
}}
@media (prefers-color-scheme: dark) {{ {_DARK_RULES} }}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 78rem;
  background: var(--page); color: var(--ink); font: 16px/1.55 {_SANS}; overflow-wrap: break-word;
}}
h1 {{ font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }}
h2 {{ font-size: 1.35rem; line-height: 1.25; margin: 0 0 .6rem; }}
h3 {{ font-size: 1.05rem; line-height: 1.35; margin: 0 0 .35rem; }}
p {{ margin: 0 0 .7rem; max-width: 46rem; }}
a {{ color: var(--link); }}
code {{ font: .86em/1.4 {_MONO}; background: var(--soft); padding: .1em .3em; border-radius: 3px; }}
.facts, footer {{ color: var(--muted); }}
.verdict {{ border-left: 4px solid var(--series-0); padding: .2rem 0 .2rem 1rem; margin: 1.2rem 0;
  font-size: 1.05rem; }}
.verdict h2 {{ font-size: 1rem; margin: .4rem 0 .2rem; }}
aside {{ background: var(--soft); border-radius: 6px; padding: .8rem 1rem; margin: 1.2rem 0; }}
aside h2 {{ font-size: 1rem; margin: 0 0 .3rem; }}
aside ul {{ margin: 0; padding-left: 1.2rem; }}
nav ol {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: 1rem 0 0; padding: 0; }}
section {{ border-top: 1px solid var(--grid); padding-top: 1.6rem; margin-top: 2.2rem; }}
figure {{ margin: 1.6rem 0 2.4rem; }}
.see {{ color: var(--ink); }}
.legend {{ display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; margin: .2rem 0 .6rem; padding: 0;
  font-size: .88rem; color: var(--ink); }}
.legend li {{ display: flex; align-items: center; gap: .4rem; }}
.swatch {{ width: 26px; height: 12px; flex: none; }}
.panels {{ display: grid; gap: 1rem 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--width) * .8)), 1fr)); }}
.panel {{ max-width: var(--width); min-width: 0; }}
.figures {{ display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }}
figure {{ grid-column: 1 / -1; min-width: 0; }}
figure.single {{ grid-column: auto; }}
.panel svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
.panel svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
figcaption {{ display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; margin-top: .7rem; font-size: .85rem;
  color: var(--muted); }}
figcaption details {{ flex-basis: 100%; }}
summary {{ cursor: pointer; }}
.scroll {{ overflow-x: auto; max-width: 100%; margin: .5rem 0 1.2rem; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }}
.caption {{ font-size: .88rem; font-weight: 600; margin: .8rem 0 .2rem; break-after: avoid; }}
th, td {{ padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top; }}
td {{ white-space: nowrap; }}
.long td {{ white-space: normal; min-width: 9rem; text-align: left; }}
.long thead th {{ text-align: left; }}
th:first-child {{ text-align: left; }}
thead th {{ color: var(--muted); font-weight: 600; vertical-align: bottom; }}
tbody th {{ font-weight: 500; min-width: 7.5rem; }}
footer {{ border-top: 1px solid var(--grid); margin-top: 3rem; padding-top: 1rem; font-size: .85rem; }}
@media print {{
  :root {{ color-scheme: light; --page: #ffffff; --soft: #f4f6f8; --link: {LIGHT["ink"]}; {variables(LIGHT)} }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  nav, details {{ display: none; }}
  .figures {{ display: block; }}
  .panels {{ grid-template-columns: 1fr 1fr; }}
  .panels.many {{ grid-template-columns: 1fr 1fr 1fr; }}
  .panel {{ break-inside: avoid; }}
  td {{ white-space: normal; }}
  figure {{ break-inside: avoid; }}
  h2, h3, .see, .legend {{ break-after: avoid; }}
  table {{ font-size: 8pt; }}
  tr {{ break-inside: avoid; }}
  a {{ text-decoration: none; }}
}}
"""
