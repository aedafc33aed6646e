"""The look of the HTML report, in light and dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --dim: #5d6673; --paper: #ffffff; --line: #d9dee5; --soft: #f4f6f8;
  --series-0: #2463c4; --series-1: #c2551b; --series-2: #2e8048; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #9aa5b3; --paper: #14171c; --line: #343b46;
  --soft: #1c2128; --series-0: #7fb0ff; --series-1: #f3a06b; --series-2: #7fd09a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 70rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.5rem 0 .5rem; color: var(--dim); font-weight: 600; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--dim); font-weight: 600; font-size: .85rem; }
.facts th { color: var(--dim); font-weight: 500; white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
.measures { width: 100%; } .measures th { font-weight: 600; } .measures tbody th { max-width: 30rem; }
.measures td { white-space: nowrap; font-variant-numeric: tabular-nums; }
.measures span { color: var(--dim); font-weight: 400; }
small { display: block; color: var(--dim); } .about { color: var(--dim); font-weight: 400; font-size: .85rem; }
.scroll { overflow-x: auto; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem;
  align-items: start; }
.gallery figure { margin: 0; } .gallery img { max-width: 100%; height: auto; display: block; background: var(--soft); }
.gallery figcaption { font-size: .75rem; line-height: 1.3; color: var(--dim); margin-top: .25rem; max-width: 20rem; }
.pixels { image-rendering: pixelated; }
.chart { margin: 1rem 0; } .chart svg { width: 100%; max-width: 42rem; height: auto; font-size: 11px; }
.chart figcaption { color: var(--dim); font-size: .9rem; }
.chart text { fill: var(--dim); } .chart .grid { stroke: var(--line); }
.legend span { margin-left: 1rem; font-weight: 600; }
.series-0 { color: var(--series-0); stroke: var(--series-0); fill: var(--series-0); }
.series-1 { color: var(--series-1); stroke: var(--series-1); fill: var(--series-1); }
.series-2 { color: var(--series-2); stroke: var(--series-2); fill: var(--series-2); }
g line { stroke-width: 1.6; }
.pinned { color: var(--dim); font-size: .8rem; overflow-wrap: anywhere; }
details { margin-top: 1.5rem; } pre { background: var(--soft); padding: 1rem; overflow-x: auto; font-size: .8rem; }
footer p { max-width: 48rem; }
@media (max-width: 40rem) { body { padding: 1rem .75rem 3rem; font-size: 14px; } h1 { font-size: 1.3rem; }
  .measures tbody th { max-width: 11rem; } .about { font-size: .8rem; } th, td { padding-right: .6rem; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
  .chart svg { font-size: 15px; } }
@media print { body { max-width: none; } section { break-inside: avoid-page; } details { display: none; } }
"""
