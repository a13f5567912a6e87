"""From token rows to pictures: terminal text, JSONL, CSV, one HTML file, one figure. Imports no torch.

rows        the token row: what a recorder writes and every report reads
source      a run directory's recorded rows and curves
inspection  rows put together as sequences and strategies
summary     the numbers and the advice
terminal, html, figure (PNG), writers (JSONL, CSV, summary)   one module per format
text        model text made visible and harmless, for all of them
payload     the data of the HTML page; page.html, page.css and the scripts are its template
"""
