"""The look of the HTML page: light and dark, at a desk, on a phone and on paper.

Where the window is narrow a table of class `stacked` is a list of cards, a row each, whose first
cell is the card's head. What is too wide for the window (code, listings, figures) scrolls inside
its own box; a command breaks between its words only.
"""

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --sheet: #fff; --text: #23272b;
  --quiet: #565c62; --line: #dcdcd6; --code: #f1f1ec; --link: #1f62a8;
  --good: #dcefe0; --on-good: #1d6b35; --middling: #faeccb; --on-middling: #7a5300;
  --bad: #f8dcd6; --on-bad: #98301b; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #15181b; --sheet: #1c2024; --text: #dfe3e6; --quiet: #a3abb2; --line: #3a4046;
    --code: #282d32; --link: #82b6ee; --good: #1d4429; --on-good: #a5e0b5;
    --middling: #4d3b10; --on-middling: #f2d48a; --bad: #57261b; --on-bad: #f7b9aa; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 2.5rem 5rem; background: var(--sheet); }
h1 { font-size: 1.9rem; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.35rem; margin: 3.2rem 0 0.8rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h3, summary { font-size: 1.05rem; font-weight: 600; margin: 1.8rem 0 0.5rem; }
h1, h2, h3, summary { overflow-wrap: break-word; }
details { margin: 0.9rem 0; }
summary { margin: 0; cursor: pointer; }
p, .points { max-width: 46rem; overflow-wrap: break-word; }
.points { padding: 0; list-style: none; }
.points li { margin: 0.6rem 0; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.84em;
  background: var(--code); }
code { padding: 0.1em 0.3em; border-radius: 3px; }
code span { white-space: nowrap; }
pre { padding: 0.9rem 1.1rem; border-radius: 6px; overflow-x: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; margin: 0.6rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.45rem 0.9rem 0.45rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
th { font-weight: 600; color: var(--quiet); white-space: nowrap; }
td code { display: block; max-width: 18rem; overflow-x: auto; }
figure { margin: 1.2rem 0; }
.plate { overflow-x: auto; background: #fff; border-radius: 6px; }
.plate img { display: block; width: var(--width); max-width: 100%; height: auto; }
figcaption { color: var(--quiet); font-size: 0.9rem; margin-top: 0.3rem; }
.badge { display: inline-block; padding: 0.05rem 0.55rem; border-radius: 1rem;
  white-space: nowrap; font-size: 0.9em; font-weight: 600; }
.good { background: var(--good); color: var(--on-good); }
.middling { background: var(--middling); color: var(--on-middling); }
.bad { background: var(--bad); color: var(--on-bad); }
.index ul { list-style: none; margin: 1rem 0; padding: 0; }
.index li { margin: 0.45rem 0; line-height: 1.35; overflow-wrap: break-word; }
.index small { color: var(--quiet); }
@media screen and (min-width: 64rem) {
  main:has(.index) { margin-left: 15rem; }
  .index { position: fixed; top: 0; bottom: 0; left: 0; width: 15rem; overflow-y: auto;
    padding: 1.5rem 1.2rem; }
  .index small { display: block; }
}
@media screen and (max-width: 48rem) {
  main { padding: 1rem 1rem 4rem; }
  .stacked thead { display: none; }
  .stacked, .stacked tbody, .stacked tr { display: block; }
  .stacked tr { border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem 0.8rem;
    margin: 0.8rem 0; }
  .stacked td { display: grid; grid-template-columns: 5.6rem minmax(0, 1fr); gap: 0.6rem;
    border: 0; padding: 0.2rem 0; }
  .stacked td::before { content: attr(data-label); color: var(--quiet); font-size: 0.85rem; }
  .stacked td:first-child { display: block; }
  .stacked td:first-child::before { content: none; }
  td code { max-width: none; }
  .plate img { min-width: calc(var(--width) * 0.55); }
}
@media print {
  body, main { background: none; }
  main { max-width: none; padding: 0; }
  html { font-size: 10pt; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 6.5pt; }
  td code { max-width: none; overflow: visible; font-size: 6.5pt; }
  table { font-size: 8pt; }
  tr, figure, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .good, .middling, .bad { border: 1px solid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
