"""One page for all experiments: what is champion, how it went lately, what runs now.

overview.py    what the page shows, read from Dagster, MLflow and the job folders
trend.py       past accuracies as a small drawing
server.py      the page, the reports and the logs, on a loopback port
"""
