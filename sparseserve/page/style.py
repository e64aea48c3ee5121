"""The style sheet of the page: light and dark, no font and no picture from anywhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --card: #f6f8fa; --line: #d0d7de; --ink: #1f2328; --faint: #59636e;
  --bar0: #0969da; --bar1: #bc4c00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #0d1117; --card: #151b23; --line: #3d444d; --ink: #f0f6fc; --faint: #9198a1;
    --bar0: #4493f8; --bar1: #f0883e;
  }
}
* { box-sizing: border-box }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, 'Segoe UI', Helvetica, Arial, sans-serif;
}
main { max-width: 940px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 1.8rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 44px 0 8px; padding-top: 12px; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 24px 0 4px }
p, ul { margin: 8px 0 }
.faint, .note { color: var(--faint) }
.note { font-size: .9rem }
.tiles { display: grid; gap: 12px; margin: 20px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)) }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px }
.tiles dt { color: var(--faint); font-size: .85rem }
.tiles dd { margin: 2px 0 0; font-size: 1.5rem; font-weight: 600 }
.tiles dd.small { font-size: .85rem; font-weight: 400; color: var(--faint) }
.wide { overflow-x: auto; margin: 12px 0 }
th[scope=row] { min-width: 9em }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--faint); padding-bottom: 6px }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600; text-align: left }
td.text { text-align: left }
th.number, td.number { text-align: right; white-space: nowrap }
details { margin: 12px 0 }
summary { cursor: pointer; color: var(--bar0) }
code, pre { font: .875rem/1.5 ui-monospace, 'SF Mono', Menlo, Consolas, monospace }
code { overflow-wrap: anywhere }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 8px 0;
  padding: 12px 14px; overflow-x: auto }
svg { display: block; width: 100%; min-width: 640px; height: auto }
svg text { font-size: 13px; fill: var(--ink) }
svg text.faint { fill: var(--faint) }
.bar0 { fill: var(--bar0) }
.bar1 { fill: var(--bar1) }
.axis { stroke: var(--line) }
.reference { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4 }
@media print { details { display: block } h2 { break-after: avoid } svg { break-inside: avoid } }
"""
