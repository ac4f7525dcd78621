"""Published and measured figures, and what the experiments here reach under the same protocol.

benchmarks.yaml    which experiment, left-out observations and seeds make a row, beside whose figures
rows.py      the same as values
cells.py     one cell: data set → two trainings → evaluation → a record
table.py     records → the rows' tables in a Markdown file
"""
