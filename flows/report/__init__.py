"""`report.html`: one page that tells a run, for whoever has to trust the model. From outside: `page`."""
