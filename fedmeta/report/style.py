"""How the page looks: no script, no font and no picture from elsewhere; light or dark as the reader's system is."""

from fedmeta.report.drawing import colours

LIGHT = """--ground: #fafaf8; --page: #ffffff; --ink: #1d1f21; --quiet: #5d6166; --line: #dddcd6;
  --accent: #00619a; --mark: #e8f2fa; color-scheme: light;"""
DARK = f"""--ground: #1b1d20; --page: #131416; --ink: #e9e9e5; --quiet: #a3a7ac; --line: #35383d;
  --accent: #6cbcf0; --mark: #1b2c3a; color-scheme: dark; {colours()}"""
STYLE = f"""
:root {{ {LIGHT}
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--sans); }}
main {{ max-width: 1120px; margin: 0 auto; padding: 44px 28px 64px; }}
.kind {{ color: var(--accent); font-size: .82rem; font-weight: 650; letter-spacing: .07em;
  text-transform: uppercase; }}
h1 {{ font-size: 2.15rem; line-height: 1.15; letter-spacing: -.015em; margin: .25em 0 .4em;
  overflow-wrap: anywhere; }}
h2 {{ font-size: 1.22rem; margin: 2.6em 0 .7em; }}
p {{ max-width: 74ch; margin: .6em 0; overflow-wrap: anywhere; }}
.lead {{ font-size: 1.18rem; line-height: 1.45; }}
.keys {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px;
  margin: 28px 0 0; padding: 0; list-style: none; }}
.keys li {{ background: var(--ground); border: 1px solid var(--line); border-radius: 10px; padding: 13px 16px 12px; }}
.keys li:first-child {{ background: var(--mark); border-color: var(--accent); }}
.keys b, .keys span, .keys small {{ display: block; }}
.keys b {{ font-size: 1.85rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }}
.keys span {{ font-size: .92rem; font-weight: 600; }}
.keys small {{ color: var(--quiet); font-size: .82rem; line-height: 1.35; margin-top: 2px; }}
.table {{ overflow-x: auto; margin: .9em 0; }}
table {{ border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }}
caption {{ caption-side: bottom; text-align: left; color: var(--quiet); font-size: .86rem; padding-top: 8px;
  max-width: 80ch; }}
th, td {{ padding: 7px 16px 7px 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }}
th {{ color: var(--quiet); font-weight: 600; font-size: .86rem; }}
.left {{ text-align: left; }}
td.left:not(:first-child) {{ white-space: normal; overflow-wrap: anywhere; min-width: 14ch; }}
tr.strong td {{ font-weight: 650; background: var(--mark); }}
tr.strong td:first-child {{ box-shadow: -8px 0 0 var(--mark); }}
.pictures {{ columns: 2 440px; column-gap: 20px; margin: 1em 0; }}
.pictures.one {{ columns: auto; max-width: 760px; }}
figure {{ margin: 0 0 20px; break-inside: avoid; background: var(--ground); border: 1px solid var(--line);
  border-radius: 10px; padding: 8px 8px 10px; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figcaption {{ color: var(--quiet); font-size: .86rem; line-height: 1.4; padding: 4px 10px 0; }}
pre {{ background: var(--ground); border: 1px solid var(--line); border-radius: 10px; padding: 13px 16px;
  overflow-x: auto; font: 13.5px/1.5 var(--mono); }}
details {{ margin: .9em 0; }}
summary {{ cursor: pointer; color: var(--accent); font-weight: 600; }}
footer {{ margin-top: 3.5em; color: var(--quiet); font-size: .86rem; border-top: 1px solid var(--line);
  padding-top: 14px; }}
@media print {{ main {{ max-width: none; padding: 0; }} h2 {{ break-after: avoid; }} }}
"""
