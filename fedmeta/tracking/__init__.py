"""MLflow: one run per experiment run. MLflow is imported where a store is opened, never with a module of this folder.

`tracker` is a run in progress: `opening` opens it, `outbox` hands what there is to log (`entries`) to `sender` from a
thread, and `sync` sends after an outage what was left. `summary_run` is a run about other runs: a comparison, a search.
`run_page`, `experiment_page`, `results`, `pictures`, `comparison_pictures` are what people see, `model` is what they
serve. `retrieval` and `fetching` read a run back; `store` checks where it all goes, `ui` serves it.
"""
