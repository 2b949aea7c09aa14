"""What a run leaves for sites to come: its start, and the same as a model that MLflow can load."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from fedmeta import checkpoint
from fedmeta.adapt.initialization import FILE, MetaModel
from fedmeta.tracking import model


def export_meta_model(checkpoint_file: Path, folder: Path, code: Collection[str] = ()) -> Path | None:
    """Writes a run's start into its folder, and beside it the MLflow model made of it; returns the model's folder.

    MLflow serves models of rows: where an own source's data are none, there is no such folder, and None is returned.

    Its input example is the mean of each feature over all training sites, which the server knows: no site's row.

    Args:
        checkpoint_file: The run's checkpoint.
        folder: The run's folder.
        code: What the run names of code that is not part of fedmeta.

    Raises:
        FedmetaError: The checkpoint cannot be read, or asks for other code.
        OSError: The folder cannot be written.
    """
    start = MetaModel.of(checkpoint.read(checkpoint_file), code)
    start.write(folder / FILE)
    if not start.form.on_rows:
        return None
    whole, part = folder / model.FOLDER, folder / f"{model.FOLDER}.part"
    for earlier in (part, whole):
        shutil.rmtree(earlier, ignore_errors=True)
    example, columns = start.example_input()
    model.save(part, folder / FILE, example, columns, regression=start.form.regression, adapts=True)
    part.replace(whole)
    return whole
