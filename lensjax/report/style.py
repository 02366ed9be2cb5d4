"""The style sheet of the HTML report: light and dark, from a phone's width up, no script and no font to load."""

from lensjax.report.figures.svg import PALETTE

PAGE = """
:root{color-scheme:light dark;--page:#f4f6f9;--card:#fff;--text:#1c2430;--dim:#566275;--rule:#d9dfe8;--link:#0b62b8;
--hero:#eaf2fb;--hero-rule:#0b62b8;--bad:#a3260f;--bad-ground:#fdf0ec}
@media (prefers-color-scheme:dark){:root{--page:#0f131a;--card:#171c24;--text:#e8ecf2;--dim:#a3aec0;--rule:#2c3442;
--link:#6db3f8;--hero:#142338;--hero-rule:#6db3f8;--bad:#ff9c85;--bad-ground:#2b1814}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:72rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;line-height:1.3;margin:0 0 .5rem}h3{font-size:1rem;margin:1.2rem 0 .4rem;overflow-wrap:anywhere}
p{margin:.4rem 0 .8rem;max-width:46rem}.dim{color:var(--dim)}.small{font-size:.875rem}
section,details.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:1.1rem 1.25rem;
margin:0 0 1rem}
.hero{background:var(--hero);border-left:6px solid var(--hero-rule)}.hero p.lead{font-size:1.125rem;max-width:52rem}
.eyebrow{text-transform:uppercase;letter-spacing:.06em;font-size:.78rem;font-weight:600;color:var(--dim);
margin:0 0 .3rem}
dl.keys{display:flex;flex-wrap:wrap;gap:.6rem 2.2rem;margin:1rem 0 0}dl.keys div{min-width:7rem}
dl.keys dt{font-size:.8rem;color:var(--dim)}dl.keys dd{margin:0;font-size:1.25rem;font-weight:650;
font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%;font-size:.92rem}caption{text-align:left;color:var(--dim);font-size:.875rem;
padding:0 0 .4rem}
th,td{text-align:left;padding:.45rem .7rem .45rem 0;border-bottom:1px solid var(--rule);vertical-align:middle}
thead th{font-size:.8rem;color:var(--dim);font-weight:600;vertical-align:bottom}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tbody th{font-weight:600;overflow-wrap:anywhere;min-width:8rem}
tr.best th[scope=row]::after{content:"fine-tune this one";display:block;color:var(--link);font-size:.8rem}
.even{white-space:nowrap}
tr.out{color:var(--dim)}
.chance{display:inline-block;width:4rem;height:.5rem;border-radius:.25rem;background:var(--rule);margin-right:.5rem;
vertical-align:middle;overflow:hidden}.chance i{display:block;height:100%;background:var(--link)}
.scroll{overflow-x:auto}.scroll:focus-visible,summary:focus-visible{outline:3px solid var(--link);outline-offset:3px}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem 1.4rem;
margin-top:1rem}
figure{margin:0;min-width:0}figcaption{font-size:.875rem;color:var(--dim);overflow-wrap:anywhere}
figcaption strong{color:var(--text);font-size:1rem}
svg.fig{display:block;width:100%;height:auto}svg.fig.mini{width:auto;max-width:none}
.narrow{max-width:36rem}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.3rem;padding:0;margin:.6rem 0 0;font-size:.875rem}
ul.legend li{display:flex;align-items:center;gap:.45rem}ul.legend svg{width:30px;height:14px;flex:none}
pre{background:var(--page);border:1px solid var(--rule);border-radius:8px;padding:.8rem 1rem;white-space:pre-wrap;
overflow-wrap:anywhere;font:.875rem/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;margin:.6rem 0}
code{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:.9em;overflow-wrap:anywhere}
summary{cursor:pointer}summary h2{display:inline}details[open]>summary{margin-bottom:.6rem}
.bad{background:var(--bad-ground)}.bad h2{color:var(--bad)}
dl.facts{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.3rem 1.2rem;margin:.4rem 0}
dl.facts dt{color:var(--dim)}dl.facts dd{margin:0;overflow-wrap:anywhere}
footer{color:var(--dim);font-size:.875rem;padding:.5rem .25rem}
@media (max-width:44rem){main{padding:.75rem .6rem 3rem}h1{font-size:1.5rem}section,details.card{padding:.9rem .9rem}
dl.keys{gap:.5rem 1.4rem}dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:.5rem}
table.cards thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table.cards,table.cards tbody,table.cards tr,table.cards td,table.cards th{display:block;width:100%}
table.cards tr{border-bottom:2px solid var(--rule);padding:.55rem 0}
table.cards td,table.cards th{border:0;padding:.12rem 0;text-align:left;white-space:normal}
table.cards td{display:flex;justify-content:space-between;gap:1rem;overflow-wrap:anywhere}
table.cards td::before{content:attr(data-label);color:var(--dim);flex:none;font-size:.85rem}
table.cards td.rank,table.cards td.minor{display:none}table.cards caption{display:block}}
@media print{body{background:#fff}section,details.card{break-inside:avoid}}
@media (forced-colors:active){.fig text{fill:CanvasText}}
"""

STYLE = PAGE + PALETTE
