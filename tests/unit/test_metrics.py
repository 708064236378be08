"""Metrics on worked cases."""

import pytest

from mmheads import metrics


@pytest.mark.parametrize(
    ("answer", "gold", "kind", "score"),
    [
        ("There are 1,204 of them.", "1204", "Integer", 1),
        ("12 or 13", "13", "Integer", 1),
        ("13.5", "13", "Integer", 0),
        ("none", "13", "Integer", 0),
        ("about 0.354", "35.4%", "Float", 1),
        ("35.7", "35.4", "Float", 1),
        ("35.8", "35.4", "Float", 0),
        ("3540", "35.4", "Float", 1),
        ("$3.5 million", "3.5", "Float", 1),
        ("-3.5", "3.5", "Float", 0),
        ("The Red Fox", "red fox", "String", 1),
        ("a fox", "the red fox", "String", 2 / 3),
        ("see page 12", "page 12", "String", 1),
        ("see p. 12", "page 12", "String", 0),
        ("in 2019-04", "2019-04", "String", 1),
        ("April 2019", "2019-04", "String", 0),
        ("mail a.b@c.org now", "a.b@c.org", "String", 1),
        ("Not answerable", "Not answerable", "None", 1),
        ("fox, hen and 3 cows", '["fox", "hen", 3]', "List", (4 / 7 + 1) / 2),
        ("fox", '["12", "20%"]', "List", 0),
        ("12 and 0.2", '["12", "20%"]', "List", 1),
    ],
)
def test_document_answers_by_the_rules(answer, gold, kind, score):
    assert metrics.document_answer(answer, gold, kind) == pytest.approx(score)


@pytest.mark.parametrize(
    ("gold", "kind", "message"),
    [
        ("many", "Integer", "'many' is not of the kind Integer"),
        ("2.5", "Integer", "'2.5' is not of the kind Integer"),
        ("fox, hen", "List", "'fox, hen' is not a list"),
        ("[]", "List", "is not a list"),
        ("fox", "Date", "kind is 'Date'; expected one of"),
    ],
)
def test_gold_answers_of_another_kind_are_refused(gold, kind, message):
    with pytest.raises(ValueError, match=message):
        metrics.document_answer("7", gold, kind)


def test_strings():
    assert metrics.same(" K\n", "K") == 1
    assert metrics.same("k", "K") == 0
    assert metrics.normalised("The  U.S., an era") == "us era"
    assert metrics.token_f1("red red fox", "red fox fox") == pytest.approx(2 / 3)
    assert metrics.token_f1("", "fox") == 0
