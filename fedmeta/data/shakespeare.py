"""The plays of Shakespeare by role: the next character from the 80 before it, as in LEAF (Caldas et al. 2018)."""

import numpy as np

from fedmeta.data.npz_file import npz_path, read_arrays
from fedmeta.data.population import ArrayPopulation, class_codes, order_classes
from fedmeta.data.ragged import Ragged, ends
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data

CONTEXT = 80
"""The characters of a row; the label is the next one."""


def load_shakespeare(data: Data) -> ArrayPopulation:
    """Returns the population of roles in the file `data.path`.

    Arrays: `x` [characters] codes into `vocab` [symbols], `offset` [roles + 1] where each role's text begins and ends,
    `site_names` [roles]. A row is a window of 80 characters, every `data.stride` characters of a role's text in the
    order of the play; windows are views of the text, which is held once. Roles without a window are left out.

    Raises:
        FedmetaError: The file is not as it should be, no role has enough rows, or a random split of windows that
            overlap would show test rows in training.
    """
    if data.split == "random" and data.stride <= CONTEXT:
        raise FedmetaError(
            f'data.split = "random" would test on text that overlaps what was trained on: set it to "blocks", '
            f"or data.stride to at least {CONTEXT + 1}"
        )
    path = npz_path(data.path)
    arrays = read_arrays(path, ("x",), ("offset", "vocab", "site_names"))
    for name in ("offset", "vocab", "site_names"):
        if name not in arrays:
            raise FedmetaError(f'{path}: no array "{name}"; it holds {", ".join(arrays)}')
    codes, offset = arrays["x"], arrays["offset"].astype(np.int64)
    vocab, names = ([str(text) for text in arrays[name]] for name in ("vocab", "site_names"))
    if codes.ndim != 1 or codes.dtype.kind not in "ui" or (len(codes) and int(codes.max()) >= len(vocab)):
        raise FedmetaError(
            f'{path}: array "x" must hold one code below {len(vocab)}, the size of "vocab", per character'
        )
    if len(offset) != len(names) + 1 or offset[0] or offset[-1] != len(codes) or (np.diff(offset) < 0).any():
        raise FedmetaError(
            f'{path}: array "offset" must rise from 0 to {len(codes)}, one step for each of "site_names"'
        )
    if len(set(names)) < len(names) or len(set(vocab)) < len(vocab):
        raise FedmetaError(f'{path}: "site_names" or "vocab" has an entry twice')
    # Inputs and labels share one coding, that of the class list, whatever the order of the file's own.
    symbols = order_classes(vocab)
    text = class_codes(vocab, symbols).astype(np.min_scalar_type(len(vocab)))[codes]
    counts = np.maximum(0, (np.diff(offset) - CONTEXT - 1) // data.stride + 1)
    enough = np.flatnonzero(counts >= max(1, data.min_rows))
    if not len(enough):
        raise FedmetaError(
            f"{path}: no role has data.min_rows = {data.min_rows} windows of {CONTEXT} characters; "
            f"the largest has {counts.max(initial=0)}"
        )
    order = np.array(sorted(enough.tolist(), key=names.__getitem__), dtype=np.int64)
    kept = counts[order]
    offsets = ends(kept)
    steps = np.arange(offsets[-1]) - np.repeat(offsets[:-1], kept)
    # Row number = where a window starts. The last window of the whole text has no next character, and no site has it.
    return ArrayPopulation(
        x=np.lib.stride_tricks.sliding_window_view(text, CONTEXT, writeable=True),
        y=np.append(text[CONTEXT:], [0]).astype(np.int64),
        names=tuple(names[role] for role in order),
        sites=Ragged(np.repeat(offset[order], kept) + steps * data.stride, offsets),
        class_names=symbols,
        tokens=True,
        in_time=True,
    )
