"""The style sheet of the run report: one column, system fonts, light and dark by the reader's setting."""

CSS = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #fff; --text: #1d1d1f; --soft: #6b6b72; --line: #e4e4e2;
  --accent: #2563c9; --accent2: #d0571c; --good: #1a7f45; --bad: #c0322b; --trained: #d8f0df; --trained-text: #0f4d29; }
@media (prefers-color-scheme: dark) { :root { --bg: #141416; --card: #1d1d20; --text: #ececee; --soft: #9b9ba3;
  --line: #313136; --accent: #7db0ff; --accent2: #ff9d66; --good: #62cf8e; --bad: #ff7d74; --trained: #17402a;
  --trained-text: #a9e8c2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 44px 0 14px; letter-spacing: -0.005em; }
.lead, .note, small, figcaption, th, dt { color: var(--soft); }
.lead { margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 26px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
.good { color: var(--good) !important; } .bad { color: var(--bad) !important; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px 6px; }
figcaption { font-size: 13px; display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: baseline; }
.legend { margin-left: auto; display: flex; gap: 14px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0; border-radius: 2px;
  background: var(--accent); }
.key.faint::before { opacity: .35; } .key.points::before { background: var(--accent2); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); } svg .base { stroke: var(--soft); opacity: .5; }
polyline { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
polyline.faint { opacity: .3; stroke-width: 1.2; } polyline.points { stroke: var(--accent2); stroke-width: 1.5; }
circle { fill: var(--accent); } circle.points { fill: var(--accent2); }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 8px 14px; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; font-weight: 500; font-size: 13px; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.total td { font-weight: 600; }
.samples table { table-layout: fixed; min-width: 760px; }
pre, code, .text { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.after { background: color-mix(in srgb, var(--trained) 40%, transparent); }
.absent { color: var(--soft); }
.preview { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; margin-top: 12px; }
.preview .text { color: var(--soft); margin-top: 8px; }
mark { background: var(--trained); color: var(--trained-text); border-radius: 2px; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); }
td details { margin-top: 8px; }
pre { margin: 12px 0 0; padding: 14px 16px; overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.note { font-size: 14px; margin: 10px 2px 0; }
.note.bad { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; margin: 0; font-size: 14px; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { .wide, figure, .card, .preview { break-inside: avoid; } details > * { display: block; } }
"""
