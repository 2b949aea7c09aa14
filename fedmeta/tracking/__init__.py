"""MLflow: one run per experiment run. MLflow is imported where a store is opened, never with a module of this folder.

- `mlflow_client`: opens stores, experiments and runs, and fetches what runs left there
- `run_logger`: a run in progress; `events` are what it logs, `async_queue` sends them from a thread
- `parent_run`: a run about other runs, such as a comparison or a search
- `metrics`, `description`, `plots`, `comparison_plots`, `experiment_view`: what people see
- `model`: the model that MLflow loads and serves
- `ui`: the MLflow UI
"""

import logging

# Matplotlib announces on a fresh machine that it looks for fonts.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
