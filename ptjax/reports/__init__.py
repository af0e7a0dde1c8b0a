"""The report of a run: from its recorded predictions and metrics to text, figures and a page."""
