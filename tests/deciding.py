"""Settings by which a run decides for itself, each of which must come to the same in every runtime."""

VALIDATED = ("evaluation.every=1", "evaluation.validation_sites=2")
DECIDING: dict[str, tuple[str, ...]] = {
    "optimal": ("server.sampling=optimal", "server.sites_per_round=3"),
    "clustered": ("server.sampling=clustered", "server.sites_per_round=3"),
    "fedvarp": ("server.variance_reduction=fedvarp", "server.sites_per_round=3"),
    "worst": ("server.objective=worst",),
    "cvar": ("server.objective=cvar", "server.cvar_share=0.5"),
    "q": ("server.objective=q", "server.q=1.0"),
    "climbs by a probe": (
        *("learner.order=auto", "server.climb_below=0.999999", "server.descend_above=0.9999995"),
        *("server.probe_every=2", *VALIDATED),
    ),
    "climbs by stalling": (
        "learner.order=auto",
        "server.climb_patience=1",
        "server.optimizer=sgd",
        "server.lr=1e-12",
        *VALIDATED,
    ),
    "stops early": ("evaluation.patience=1", "server.optimizer=sgd", "server.lr=1e-12", *VALIDATED),
    "stops at a target": ("server.until={score = 0.05}", *VALIDATED),
}
"""By name, what is set."""

DECIDED = {
    "climbs by a probe": "climb",
    "climbs by stalling": "climb",
    "stops early": "stop",
    "stops at a target": "stop",
}
"""What the ledger must then hold."""

DEPLOYED = ("optimal", "worst", "climbs by stalling", "stops early")
"""One of each kind, for where a run takes minutes."""
