"""A search in words: Markdown for people, JSON for programs, and the best settings as an experiment to run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from fedmeta.comparison import interval
from fedmeta.tuning.results import Attempt, Search
from fedmeta.tuning.space import Choices, Dimension, words

MOST_ROWS = 12
"""How many trials a page shows; of more, the best ones."""


def verdict(search: Search) -> str:
    """Returns in a sentence or two what was found, and what it is worth."""
    best, own = search.best, search.own
    said = f"Best of {len(search.attempts)} trials by {search.plan.sampler}: {words(best.settings)}"
    said += f" ({search.score.name} {best.score:.3f} on validation sites"
    if best == own:
        return f"{said}): the experiment as it was, and nothing tried did better."
    said += f"; {own.score:.3f} as it was)." if own and own.score is not None else ")."
    judged = search.judged
    if judged:
        gain = interval(judged.difference, judged.low, judged.high)
        sure = "surely better" if judged.low > 0 else "surely worse" if judged.high < 0 else "not surely different"
        said += f" On new sites {judged.best:.3f} against {judged.own:.3f}, {sure} ({gain}, 95 % over sites"
        said += f", {judged.seeds} seeds)." if judged.seeds > 1 else ")."
    return said


def markdown(search: Search) -> str:
    """Returns the verdict, the best trials and the importance of keys as Markdown."""
    keys = [each.key for each in search.plan.space]
    lines = [verdict(search), "", *_table([search.score.name, *(_short(key) for key in keys), "state"], _rows(search))]
    lines += ["", f"{_states(search)}, {search.wall_s:.0f} s together. Judged on validation sites, split off the "]
    lines[-1] += "training sites; new sites took no part."
    if search.importance:
        shares = [[_short(key), f"{share:.0%}"] for key, share in search.importance.items()]
        lines += ["", *_table(["key", "share of the variance that it explains"], shares)]
    if search.judged:
        lines += ["", *_judged(search)]
    lines += ["", "Searched: " + "; ".join(f"`{described(each)}`" for each in search.plan.space) + "."]
    return "\n".join(lines) + "\n"


def _judged(search: Search) -> list[str]:
    judged = search.judged
    assert judged
    rows = [
        ["best", f"{judged.best_global:.3f}", f"{judged.best:.3f}", ""],
        ["as it was", f"{judged.own_global:.3f}", f"{judged.own:.3f}", ""],
        ["difference", "", "", interval(judged.difference, judged.low, judged.high)],
        ["difference, the search's own seed", "", "", interval(*judged.first)],
    ]
    return _table(["on new sites", "global", "personalized", "95 % over sites"], rows)


def _rows(search: Search) -> list[list[str]]:
    shown = search.done[:MOST_ROWS]
    own = search.own
    if own and own not in shown:
        shown.append(own)
    return [_row(each, search) for each in shown]


def _row(attempt: Attempt, search: Search) -> list[str]:
    cells = [_cell(attempt.settings[each.key]) for each in search.plan.space]
    return [f"{attempt.score:.3f}", *cells, "as it was" if attempt == search.own else attempt.state]


def _states(search: Search) -> str:
    states = [each.state for each in search.attempts]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def described(dimension: Dimension) -> str:
    """Returns a dimension as it is written on the command line."""
    if isinstance(dimension, Choices):
        values = (f"[{value}]" if "," in str(value) else str(value) for value in dimension.values)
        return f"{dimension.key}={','.join(values)}"
    return f"{dimension.key}={dimension.low:g}:{dimension.high:g}{':log' if dimension.log else ''}"


def to_json(search: Search) -> str:
    """Returns the best settings, their score, every trial, and how they do on new sites as one JSON object."""
    plan, best, own = search.plan, search.best, search.own
    value = {
        "sampler": plan.sampler,
        "score": search.score.to_json(),
        "best": {"settings": best.settings, "score": best.score, "run_id": best.run_id},
        "own": {"settings": own.settings, "score": own.score, "run_id": own.run_id} if own else None,
        "new_sites": asdict(search.judged) if search.judged else None,
        "importance": search.importance,
        "wall_s": round(search.wall_s, 3),
        "experiment": str(plan.folder / "best.toml"),
        "trials": [asdict(each) for each in search.attempts],
    }
    return json.dumps(value)


def write(search: Search, folder: Path) -> None:
    """Writes tuning.md, tuning.json and best.toml, the experiment with the best settings, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tuning.md").write_text(markdown(search))
    (folder / "tuning.json").write_text(to_json(search) + "\n")
    said = "".join(f"# {line}\n" for line in _wrapped(verdict(search)))
    (folder / "best.toml").write_text(f"{said}\n{search.experiment.to_toml()}")


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 118)


def _short(key: str) -> str:
    return key.removeprefix("learner.")


def _cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
