"""MLflow: one run per experiment run. Only `tracker` imports MLflow, and only when a run starts.

`tracker` opens a run and takes what there is to log; `outbox` sends it from a thread, and again after an outage;
`run_page`, `experiment_page`, `results`, `pictures` are what people see; `store` checks where it goes, `ui` serves it.
"""
