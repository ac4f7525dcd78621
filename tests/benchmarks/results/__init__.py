"""Published and measured figures, and what the experiments here reach under the same protocol.

benchmarks.yaml    which experiment, left-out observations and seeds make a benchmark, beside whose figures
benchmarks.py      the same as values
runs.py     one run: data set → two trainings → evaluation → a record
table.py     records → the benchmarks' tables in a Markdown file
"""
