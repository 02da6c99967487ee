"""How the page of a report looks: its CSS, for light and dark, wide and narrow screens."""

# Of as many runs; later ones begin again, with broken lines.
LIGHT = ("#1769c4", "#c2500f", "#1a8048", "#7a42cf", "#bb2566", "#0d7d86", "#8a6a00", "#5b6675")
DARK = ("#72b4ff", "#ff9f68", "#66d394", "#bd9dff", "#ff8fb8", "#5fd3da", "#e3bd55", "#aeb9c9")

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --card: #ffffff; --ink: #1c2127; --pale: #5c6672; --line: #dfe2e6;
  --mark: #fff3c4; --mark-ink: #5b4300; --link: #14599f;
LIGHT_RUNS
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1b1f25; --ink: #e4e7eb; --pale: #a0a9b5; --line: #333a44;
    --mark: #3b3213; --mark-ink: #f4dd94; --link: #8cc0ff;
DARK_RUNS
  }
  figure.sheet img { filter: brightness(.88); }
}
RUN_CLASSES
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    "Noto Sans", "DejaVu Sans", sans-serif;
}
.page { max-width: 78rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.3rem); line-height: 1.2; letter-spacing: -.015em; margin: 0; }
h2 {
  font-size: 1.35rem; letter-spacing: -.01em; line-height: 1.25; margin: 3.2rem 0 .6rem;
  padding-top: .9rem; border-top: 1px solid var(--line); scroll-margin-top: 1rem;
}
h3 { font-size: 1rem; line-height: 1.35; margin: 1.6rem 0 .5rem; }
p { margin: .4rem 0 .9rem; max-width: 46rem; }
h1, h2, h3, p, figcaption, summary { overflow-wrap: anywhere; }
a { color: var(--link); text-underline-offset: .15em; }
.pale, .missing { color: var(--pale); }
.missing { font-style: italic; margin: .3rem 0; }
nav ul, .runs {
  list-style: none; display: flex; flex-wrap: wrap; gap: .35rem 1.3rem; padding: 0; margin: 1rem 0 0;
}
.runs { font-weight: 600; }
.runs li { overflow-wrap: anywhere; min-width: 0; }
.dot {
  display: inline-block; width: .72em; height: .72em; border-radius: 50%; margin-right: .45em;
  background: var(--run); vertical-align: -.02em;
}
.scroll {
  display: block; overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card);
}
.scroll:focus-visible, summary:focus-visible, a:focus-visible, input:focus-visible + label {
  outline: 2px solid var(--link); outline-offset: 2px;
}
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; vertical-align: baseline; padding: .42rem .85rem; border-top: 1px solid var(--line);
}
thead th { border-top: 0; border-bottom: 1px solid var(--line); min-width: 11rem; overflow-wrap: anywhere; }
thead th:first-child { min-width: 0; }
tbody tr:first-child > * { border-top: 0; }
tbody th { font-weight: 500; color: var(--pale); min-width: 8rem; overflow-wrap: anywhere; }
th:first-child { position: sticky; left: 0; background: var(--card); }
td { overflow-wrap: anywhere; }
td.number { white-space: nowrap; }
td.code { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
tr.differs th { color: var(--ink); font-weight: 600; }
tr.differs td { background: var(--mark); color: var(--mark-ink); }
td .best { color: var(--pale); font-size: .85em; margin-left: .3em; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
.panels {
  display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16.5rem), 1fr));
}
.panels figure {
  margin: 0; padding: .7rem .7rem .4rem; min-width: 0; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem;
}
.panels figcaption { font-size: .86rem; font-weight: 600; margin-bottom: .3rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--pale); font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; }
svg .line { stroke: var(--run); stroke-width: 1.8; fill: none; stroke-linejoin: round; }
svg circle { fill: var(--run); }
.side {
  display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  align-items: start;
}
figure.sheet { margin: 0; min-width: 0; }
figure.sheet > figcaption { font-size: .9rem; margin-bottom: .4rem; }
figure.sheet img { display: block; width: 100%; height: auto; }
figure.sheet label { display: block; cursor: zoom-in; }
figure.sheet input { position: absolute; opacity: 0; }
figure.sheet:has(input:checked) { grid-column: 1 / -1; }
figure.sheet input:checked + label { cursor: zoom-out; }
figure.sheet input:checked + label img { width: auto; max-width: none; margin: 0 auto; }
footer {
  margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--pale);
  font-size: .88rem;
}
@media print { nav, summary { display: none; } .page { padding: 0; } }
"""


def css_of(num_runs: int) -> str:
    """The CSS of a page with so many runs."""

    def colours(values):
        return "".join(f"  --run-{i}: {values[i % len(values)]};\n" for i in range(num_runs))

    classes = [f".run-{i} {{ --run: var(--run-{i}); }}" for i in range(num_runs)]
    classes += [
        f"svg .line.run-{i} {{ stroke-dasharray: {4 + i // len(LIGHT)} 3; }}"
        for i in range(len(LIGHT), num_runs)
    ]
    text = CSS.replace("LIGHT_RUNS\n", colours(LIGHT)).replace("DARK_RUNS\n", colours(DARK))
    classes.append(f"thead th + th {{ width: {72 / max(num_runs, 1):.2f}%; }}")
    return text.replace("RUN_CLASSES", "\n".join(classes)).strip()
