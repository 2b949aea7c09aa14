from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedmeta.messages import SitesReply
from server.agreement import agreeing, difference

FORMS = st.sampled_from([("age", "chol"), ("chol", "age"), ("age",), ()])


def reply(name: str, features: tuple[str, ...], regression: bool = False, tokens: bool = False) -> SitesReply:
    shape = (len(features),) if features else (28, 28)
    return SitesReply((name,), (3,), (3,), ("no", "yes"), features, shape, regression, tokens)


@given(st.lists(st.tuples(FORMS, st.booleans(), st.booleans()), max_size=9), st.randoms(use_true_random=False))
def test_the_most_frequent_form_wins_whatever_the_order(forms: list[Any], random: Random) -> None:
    replies = {number: reply(f"site-{number}", *form) for number, form in enumerate(forms)}
    accepted, refused = agreeing(replies)
    assert {name for answer in accepted.values() for name in answer.names} | set(refused) == {
        name for answer in replies.values() for name in answer.names
    }
    assert all(refused.values())
    if forms:
        most = max(forms.count(form) for form in forms)
        assert len(accepted) == most
        first = next(iter(accepted.values()))
        assert all(difference(answer, first) == "" for answer in accepted.values())
    shuffled = list(replies.items())
    random.shuffle(shuffled)
    ids = {node + 100: answer for node, answer in shuffled}
    assert agreeing(ids)[1] == refused


def test_each_difference_is_said() -> None:
    here = reply("a", ("age", "chol"))
    assert difference(here, here) == ""
    assert difference(reply("b", ("chol", "age")), here) == "its columns are in another order"
    assert difference(reply("b", ("age",)), here) == "columns missing: chol"
    assert difference(reply("b", ("age", "chol"), True), here) == "its labels are numbers, the federation's classes"
    assert "codes" in difference(reply("b", ("age", "chol"), tokens=True), here)
    assert "columns missing" in difference(reply("b", ()), here)
