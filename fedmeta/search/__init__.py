"""Tuning and comparing: one search engine (Optuna), one store of trials.

- `space`, `samplers`, `study`, `trial`, `optimize`, `results`: a search for settings, scored on validation sites alone
- `compare`, `comparison`: learners on the same sites, splits and seeds, with paired differences and intervals
- `final_evaluation`: the best trial of a search against the experiment's own settings, on new sites
- `search_report`, `comparison_report`: Markdown, JSON, pictures and MLflow
"""
