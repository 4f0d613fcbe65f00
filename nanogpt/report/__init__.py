"""A run's report.html: its text (`report.py`, `template.html`) and its figures (`figures.py`)."""
