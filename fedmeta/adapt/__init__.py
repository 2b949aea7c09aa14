"""A site that joins after a run: from the finished run and the site's own labelled rows to its own model.

`start` is what a run hands on, `finding` gets it from wherever the run is kept; `site` reads the site's rows and
compares them with the run's; `judging` chooses how far to adapt and says honestly how good that is; `model` is the
result, on raw rows; `writing` puts it into a folder, with `onnx` and `card`; `serving` is what MLflow loads.
"""
