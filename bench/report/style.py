"""The style sheet of the page of results: light and dark, wide and narrow, nothing fetched."""

STYLE = """
:root {
  color-scheme: light dark;
  --font: system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --paper: #ffffff; --ink: #1c2126; --soft: #555f69; --line: #d5dbe1; --shade: #f4f6f8; --link: #0a5a9c;
  --lost: #9c2f00; --grid: #e0e4e9;
  --s0: #0072b2; --s1: #d55e00; --s2: #007f5f; --s3: #b0478a; --s4: #9a6b00; --s5: #3d94c9;
  --s6: #5d6670; --s7: #6848a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e3e7eb; --soft: #a0a9b2; --line: #3a4249; --shade: #1d2226; --link: #7cbcf0;
    --lost: #ff9a66; --grid: #2d343a;
    --s0: #5aaef0; --s1: #ff8a3d; --s2: #3ccf9f; --s3: #ec95c8; --s4: #e8bb3a; --s5: #a5dcff;
    --s6: #b4bcc4; --s7: #b9a3f0;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body {
  max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 var(--font);
}
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .25rem; padding-top: .75rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .25rem; overflow-wrap: anywhere; }
h4 { font-size: .95rem; margin: 1rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 48rem; }
a { color: var(--link); }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.where, .settings, figcaption, .what { color: var(--soft); font-size: .875rem; max-width: none; }
.where span { display: inline-block; }
.settings b { font-weight: 600; }
nav {
  background: var(--shade); border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem; margin: 1.25rem 0;
}
nav h2 { all: unset; font-weight: 600; }
nav ul { list-style: none; margin: .25rem 0 0; padding: 0; }
nav > ul > li { margin-top: .35rem; }
nav li li { display: inline-block; margin-right: 1rem; font-size: .875rem; overflow-wrap: anywhere; }
.wide {
  overflow-x: auto; width: fit-content; max-width: 100%; margin: .5rem 0 1rem;
  border: 1px solid var(--line); border-radius: 6px;
}
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { background: var(--shade); font-weight: 600; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
.text { text-align: left; }
td.long { white-space: normal; min-width: 16rem; max-width: 28rem; overflow-wrap: break-word; }
tr.lost td { color: var(--lost); }
details { margin: .5rem 0 1rem; }
summary { cursor: pointer; font-size: .9rem; font-weight: 600; padding: .25rem 0; }
details details { margin-left: 1rem; }
figure { margin: 1rem 0; }
.picture { overflow-x: auto; }
.picture svg { display: block; max-width: 100%; height: auto; }
.picture svg * { stroke-linejoin: round; stroke-linecap: butt; }
.picture svg text { font-family: var(--font) !important; }
.skipped { border-left: 4px solid var(--lost); padding: .25rem .75rem; background: var(--shade); max-width: none; }
ul.notes { font-size: .875rem; color: var(--soft); padding-left: 1.25rem; }
@media (max-width: 40rem) { body { padding: 1rem .75rem 3rem; font-size: 15px; } }
"""
