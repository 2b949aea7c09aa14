from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedmeta.messages import SitesReply
from server.schema import schema_mismatch, select_majority_schema

FORMS = st.sampled_from([("age", "chol"), ("chol", "age"), ("age",), ()])


def reply(
    name: str, features: tuple[str, ...], regression: bool = False, tokens: bool = False, more: int = 0
) -> SitesReply:
    shape, names = (len(features),) if features else (28, 28), (name, *(f"{name}-{number}" for number in range(more)))
    rows = (3,) * len(names)
    return SitesReply(names, rows, rows, ("no", "yes"), features, shape, regression, tokens)


@given(st.lists(st.tuples(FORMS, st.booleans(), st.booleans()), max_size=9), st.randoms(use_true_random=False))
def test_the_most_frequent_form_wins_whatever_the_order(forms: list[Any], random: Random) -> None:
    replies = {number: reply(f"site-{number}", *form) for number, form in enumerate(forms)}
    accepted, refused = select_majority_schema(replies)
    assert {name for answer in accepted.values() for name in answer.names} | set(refused) == {
        name for answer in replies.values() for name in answer.names
    }
    assert all(refused.values())
    if forms:
        most = max(forms.count(form) for form in forms)
        assert len(accepted) == most
        first = next(iter(accepted.values()))
        assert all(schema_mismatch(answer, first) == "" for answer in accepted.values())
    shuffled = list(replies.items())
    random.shuffle(shuffled)
    ids = {node + 100: answer for node, answer in shuffled}
    assert select_majority_schema(ids)[1] == refused


def test_a_node_with_many_names_has_one_voice() -> None:
    honest = {node: reply(f"hospital-{node}", ("age", "chol")) for node in (1, 2)}
    liar = reply("a", ("age",), more=8)
    accepted, refused = select_majority_schema({3: liar, **honest})
    assert set(accepted) == set(honest)
    assert set(refused) == set(liar.names)
    # One against one: the form of more sites.
    assert set(select_majority_schema({1: honest[1], 3: liar})[0]) == {3}


def test_each_difference_is_reported() -> None:
    here = reply("a", ("age", "chol"))
    assert schema_mismatch(here, here) == ""
    assert schema_mismatch(reply("b", ("chol", "age")), here) == "its columns are in another order"
    assert schema_mismatch(reply("b", ("age",)), here) == "columns missing: chol"
    assert (
        schema_mismatch(reply("b", ("age", "chol"), True), here) == "its labels are numbers, the federation's classes"
    )
    assert "codes" in schema_mismatch(reply("b", ("age", "chol"), tokens=True), here)
    assert "columns missing" in schema_mismatch(reply("b", ()), here)
