"""How the report looks, in light and in dark, on a phone and on a desktop."""

STYLE = """
:root { --ink: #1f2933; --faint: #66727f; --line: #e4e7eb; --paper: #fff; --card: #f7f9fb;
  --c0: #2563eb; --c1: #e0583b; --c2: #0d9373; --c3: #9333ea; --c4: #d97706; --c5: #0891b2;
  --c6: #be185d; --c7: #65737e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --faint: #9aa7b4; --line: #333d47;
  --paper: #14191e; --card: #1c232a; --c0: #6ea0ff; --c1: #ff8a70; --c2: #3fcaa5; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 1280px; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
header p { color: var(--faint); margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)); gap: .7rem;
  margin-top: 1rem; }
.cards div { background: var(--card); border-radius: 10px; padding: .7rem .9rem; }
.cards b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.cards span { color: var(--faint); font-size: .85rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 1.2rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: .9rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); }
svg .line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg .area { fill: currentColor; opacity: .25; }
svg circle { fill: currentColor; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .88rem; margin: .5rem 0; }
.legend i { display: inline-block; width: .75em; height: .75em; border-radius: 3px;
  background: currentColor; margin-right: .4em; }
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; margin-top: .4rem; }
.bar i { background: currentColor; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; }
summary { cursor: pointer; color: var(--faint); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""
