"""A site that joins after a run: from the finished run and the site's own labelled rows to its own model.

`initialization` is what a finished run leaves for new sites, `locate` finds it in a file, a folder or a store; `rows`
reads the site's rows and compares them with the run's; `estimate` chooses how far to adapt and how good that is;
`model` is the result, on raw rows; `writing` puts it into a folder, with `export` and `model_card`; `serving` is what
MLflow loads.
"""
