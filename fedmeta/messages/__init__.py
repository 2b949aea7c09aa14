"""The contract between clients/ and server/: what each message holds. Nothing else leaves a site.

`query.sites`: a node replies with its sites' names, numbers of train and test rows and weights, the labels that occur
    there, the feature names, which of them are categories, and the shape of a row; for own problems a digest of the
    form of their data.
`query.categories`: where some features are columns of categories, the server names these and training sites; a node
    replies with the names that at least `data.category_rows` train rows of one of these sites have.
`query.sums`: the server names training sites; a node replies with the count, the sum and the sum of squares of each
    feature, and of each target of a regression, over those sites' train rows, added up.
`query.engine`: the server sends what it will send for the first round's `train`; a node replies with the cohort engine
    that it found fastest, the seconds that each took in a trial, and the memory that it can give to one cohort.
`query.norms`: with server.sampling = "optimal" the server sends what it sends for `train`, for all training sites;
    a node replies with the norm of each site's meta-gradient.
`train`: the server sends the meta-state, the round, the class list and the names of the cohort's sites; a node replies
    with the weighted sum of their meta-gradients (or displacements) and its weight, and per site with the query loss
    and whether the gradient was finite. Where the server's aggregator is not the mean, where it weighs sites by
    their loss or remembers what they sent, it asks for each site's own meta-gradient, and a node replies with those in
    place of the sum. With `server.compression` the node replies with each site's own in fewer bytes
    (`fedmeta.compression`). With `server.compression_down` a message that trains holds, in place of the meta-state,
    what changed in it since the round whose state the node has, in fewer bytes, and that round (0: the state is whole).
`evaluate`: the server sends the meta-state, the number of inner steps, the class list and names of sites; a node
    replies per site with the loss and each of the run's metrics on test data after 0, 1, ... inner steps, and with the
    number of steps that the site takes. At the end of a run it also asks, by group of sites, for sums over test rows:
    right rows, confusion matrix, sums of losses, of confidence and of errors, and histograms of log odds by class; and
    where the run has subgroups of test rows, the same sums, the rows and the score of each that is large enough. With
    `stream.memory = "alarm"` a node replies per site with the row of its stream at which its alarm went off.
`query.keys`, `query.shares`, `query.unmask`: with `privacy.secure_aggregation`, steps 1, 2 and 4 of a secure sum
    (`fedmeta.secure`): public keys of sites, their secrets in shares that are encrypted for their neighbors, and shares
    of what does not cancel.
`train.masked`, `query.masked_sums`, `evaluate.masked`: step 3: what `train`, `query.sums` and `evaluate` are sent, with
    the neighbors' shares; a node replies per site with numbers under masks: the weighted meta-gradient, the weight, and
    the query loss with their counts; the sums of features and targets; or its scores, by group of sites.

A node that cannot answer replies with a code of `FAILURES` and nothing else: the text of an exception may hold a cell
of the data. Every message is built and read here and nowhere else; reading checks names, types, shapes and lengths.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from fedmeta.messages.records import MessageError, payload_bytes, write_arrays
from fedmeta.messages.registration import (
    CategoriesReply,
    CategoriesRequest,
    SitesReply,
    SumsReply,
    SumsRequest,
)
from fedmeta.messages.rounds import (
    LOCAL_METHODS,
    LOSS,
    EngineReply,
    EvaluateReply,
    NormsReply,
    RoundRequest,
    TrainReply,
)

__all__ = [
    "EVALUATE",
    "FAILURES",
    "LOCAL_METHODS",
    "LOSS",
    "MASKED_EVALUATE",
    "MASKED_SUMS",
    "MASKED_TRAIN",
    "QUERY_CATEGORIES",
    "QUERY_ENGINE",
    "QUERY_KEYS",
    "QUERY_NORMS",
    "QUERY_SHARES",
    "QUERY_SITES",
    "QUERY_SUMS",
    "QUERY_UNMASK",
    "TRAIN",
    "CategoriesReply",
    "CategoriesRequest",
    "EngineReply",
    "EvaluateReply",
    "MessageError",
    "NormsReply",
    "RoundRequest",
    "SitesReply",
    "SumsReply",
    "SumsRequest",
    "TrainReply",
    "failure",
    "pack_failure",
    "payload_bytes",
    "write_arrays",
]

QUERY_SITES, QUERY_SUMS, QUERY_ENGINE = "query.sites", "query.sums", "query.engine"
QUERY_CATEGORIES, QUERY_NORMS = "query.categories", "query.norms"
QUERY_KEYS, QUERY_SHARES, QUERY_UNMASK = "query.keys", "query.shares", "query.unmask"
MASKED_SUMS, MASKED_TRAIN, MASKED_EVALUATE = "query.masked_sums", "train.masked", "evaluate.masked"
TRAIN, EVALUATE = "train", "evaluate"


FAILURES = {
    "bad-experiment": "the node could not use the experiment it was sent; its own log has the reason",
    "bad-data": "the site's data could not be read; its own log names the file and the cell",
    "bad-message": "the node could not read the message",
    "no-state": "the node was restarted and lacks the state that the message changes; next time it gets the whole one",
    "bad-storage": "the site could not write to its disk what stays with it; its own log has the reason",
    "beyond-policy": "the site's policy does not grant what was asked; its own log names the limit",
    "unknown-site": "the node does not host a site that it was asked for",
    "secure-refused": "the site refused a step of secure aggregation, or lost its secrets; its log has the reason",
    "beyond-range": "a number of the site is too large for secure sums: raise privacy.quantum, or shorten by clip_norm",
    "out-of-memory": "the node ran out of memory",
    "internal": "the node failed for another reason; its own log has the traceback",
}
"""Every code that a node may reply with instead of an answer, and what it means."""


def pack_failure(code: str) -> RecordDict:
    """Returns the content of a reply with the reason for no answer: a code of `FAILURES`."""
    return RecordDict({"failure": ConfigRecord({"code": code if code in FAILURES else "internal"})})


def failure(content: RecordDict) -> str | None:
    """Returns the failure code of a reply, or None where it is an answer."""
    if "failure" not in content:
        return None
    code = content["failure"].get("code") if isinstance(content["failure"], ConfigRecord) else None
    return code if isinstance(code, str) and code in FAILURES else "internal"
