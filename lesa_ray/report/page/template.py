"""The page's HTML: one file, no script, nothing fetched. Jinja escapes whatever is not marked as markup."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{{ generator }}">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="facts">{{ facts }}</p>
{%- if verdict %}
<div class="verdict">
{%- for name, sentences in verdict %}
{%- if verdict|length > 1 %}<h2>{{ name }}</h2>{% endif %}
<p><strong>{{ sentences[0] }}</strong> {{ sentences[1:]|join(" ") }}</p>
{%- endfor %}
</div>
{%- endif %}
{%- if missing %}
<aside aria-label="What is missing">
<h2>What is missing</h2>
<ul>{% for one in missing %}<li>{{ one }}</li>{% endfor %}</ul>
</aside>
{%- endif %}
<nav aria-label="Sections"><ol>
{%- for section in sections %}<li><a href="#{{ section.anchor }}">{{ section.title }}</a></li>{% endfor -%}
</ol></nav>
</header>
<main>
{%- for section in sections %}
<section id="{{ section.anchor }}">
<h2>{{ section.title }}</h2>
{%- for text in section.texts %}<p>{{ text }}</p>{% endfor %}
{%- for command in section.commands %}<p><code>{{ command }}</code></p>{% endfor %}
{%- for name, table in section.tables %}
{{ data_table(name, table) }}
{%- endfor %}
{%- if section.figures %}
<div class="figures">
{%- endif %}
{%- for figure in section.figures %}
<figure id="{{ figure.name }}"{% if figure.panels|length == 1 %} class="single"{% endif %}>
<h3>{{ figure.title }}</h3>
<p class="see">{{ figure.see }}</p>
{%- if figure.legend %}
<ul class="legend">{% for label, swatch in figure.legend %}<li>{{ swatch }}{{ label }}</li>{% endfor %}</ul>
{%- endif %}
<div class="panels{% if figure.many %} many{% endif %}" style="--width: {{ figure.width }}px">
{%- for svg in figure.panels %}<div class="panel">{{ svg }}</div>{% endfor -%}
</div>
<figcaption>
<span>Make it again: <code>{{ figure.how }}</code>, then <a href="#settings">this page</a>.</span>
{%- if images %}
<span>As an image: <a href="figures/{{ figure.name }}.png">figures/{{ figure.name }}.png</a>.</span>
{%- endif %}
{%- if figure.table %}
<details><summary>The figures as a table</summary>{{ data_table(none, figure.table) }}</details>
{%- endif %}
</figcaption>
</figure>
{%- endfor %}
{%- if section.figures %}
</div>
{%- endif %}
</section>
{%- endfor %}
</main>
<footer>{{ footer }}</footer>
</body>
</html>
"""

MACROS = """{% macro data_table(name, table) -%}
{%- if name %}<p class="caption">{{ name }}</p>{% endif %}
<div class="scroll"><table{% if table.long %} class="long"{% endif %}>
{%- if table.columns %}
<thead><tr>{% for cell in table.columns %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
{%- endif %}
<tbody>
{%- for row in table.rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{%- endmacro %}
"""
