"""What is wrong with data, all of it in one message; names and lines as people read them."""

from collections.abc import Sequence

from fedmeta.errors import FedmetaError

NAMED = 20
"""How many names an error lists."""

PLACES = 5
"""How many lines an error lists."""


def numbered(what: str, numbers: Sequence[int]) -> str:
    """Returns "line 4", "lines 4 and 9" or "lines 1, 2, 3, 4, 5 and 7 more"."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    if len(numbers) <= PLACES:
        return f"{what}s {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    return f"{what}s {', '.join(map(str, numbers[:PLACES]))} and {len(numbers) - PLACES} more"


def listed(names: Sequence[str], most: int = NAMED) -> str:
    """Returns names as one text; of many, the first and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:80] for name in names[:most]) + more


def refuse(problems: Sequence[str]) -> None:
    """Raises `FedmetaError` with all problems in one message, where there are any; each is named once."""
    distinct = grouped(list(dict.fromkeys(problems)))
    if len(distinct) == 1:
        raise FedmetaError(distinct[0])
    if distinct:
        raise ManyProblemsError(distinct)


def grouped(problems: Sequence[str]) -> list[str]:
    """Returns problems, those that several files have in the same words as one that names the files."""
    words: dict[str, list[tuple[str, str]]] = {}
    for problem in problems:
        path, _, rest = problem.partition(": ")
        words.setdefault(rest or problem, []).append((path, problem))
    found = []
    for rest, same in words.items():
        files = [path for path, _ in same]
        found += [problem for _, problem in same] if len(same) == 1 else [f"{listed(files, 5)}: {rest}"]
    return found


class ManyProblemsError(FedmetaError):
    """Several things are wrong with data; each is named, in one line.

    Attributes:
        problems: What is wrong, a text each.
    """

    longest = 20_000

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems[:MOST_PROBLEMS], start=1))
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        super().__init__(f"{len(problems)} problems: {shown}{more}")


MOST_PROBLEMS = 60
"""How many problems one message names."""
