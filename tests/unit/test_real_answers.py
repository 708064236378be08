"""A text model with few dense heads, and asked about documents: what is kept and read."""

import dataclasses
import itertools

import pandas as pd
import pytest
import torch

from cluster import real_prose, real_questions, real_results, real_streaming
from mmheads import answers, store
from mmheads.models import load
from mmheads.prompts import encode
from mmheads.scoring import score_needles
from mmheads.tasks.needles import Needles

pytestmark = pytest.mark.filterwarnings("ignore:.*unknown to the tokenizer")
SOURCE = Needles(0.0)
RANDOM = "random {:.0%}, same layers"


@pytest.fixture(scope="module")
def vlm():
    return load("tiny-qwen3-m", device="cpu")


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(store.paths, "RUNS", tmp_path)
    return tmp_path


@pytest.fixture
def scores(vlm):
    return score_needles(
        vlm, tasks=["text"], lengths=[128], haystacks=2, source=SOURCE, progress=False
    )


def prompt(number: int):
    made = SOURCE.make("text", 128, (number % 6) / 5, haystack=number, split="test")
    return dataclasses.replace(made, haystack=(0, 2, number, 0))


def test_answers_with_dense_heads_are_read_beside_those_of_the_whole_model(vlm, scores):
    top = {f"top {share:.0%}": scores.top(share) for share in real_streaming.SHARES}
    drawn = real_results.plan.random_sets(scores.top(0.05))
    given = real_streaming.answered(vlm, [prompt(4), prompt(5)], top)
    real_streaming.answered(vlm, [prompt(4)], {RANDOM.format(0.05): drawn[4]})
    without = {"top 5%": scores.top(0.05)}
    answers.answer(vlm, [prompt(4)], without, max_new_tokens=24, progress=False)
    table = real_results.dense_answers(scores, "")
    assert len(table) == 2 * 4 + 1, "no answer with ablated heads is among them"
    (random,) = table[table["ablation"] == real_results.RANDOM].to_dict("records")
    assert (random["share"], random["draw"], random["heads"]) == (0.05, 4, len(drawn[4]))
    assert set(table[table["inside"]]["haystack"]) == {5}
    assert set(table[table["paired"]]["haystack"]) == {4}
    assert set(table[table["paired"]]["share"]) == {0.05}
    whole = table[table["ablation"] == answers.FULL_MODEL]
    right = given[given["ablation"] == answers.FULL_MODEL]["prediction"]
    assert len(whole) == 4
    assert right.str.len().gt(0).all()


def test_answers_without_heads_at_some_tokens_have_names_of_their_own(vlm, scores):
    top = {"top 5%": scores.top(0.05)}
    moments = ("both", *real_results.plan.WHEN)
    asked = [prompt(4), prompt(5)]
    for when in moments:
        answers.answer(vlm, asked, top, when=when, max_new_tokens=24, progress=False)
    table = real_results.shipped_answers(scores, folder="")
    names = ["top 5%", *(f"top 5%, {tokens}" for tokens in real_results.plan.WHEN.values())]
    assert sorted(table["ablation"]) == sorted(2 * [answers.FULL_MODEL, *names])
    told = pd.DataFrame(real_results.answer_rows(with_all_tops(table))).set_index("about")
    assert told.loc[names[1:], "quantity"].eq("right answers, some tokens").all()
    assert told.loc[names[0], "quantity"] == "right answers"


def with_all_tops(table: pd.DataFrame) -> pd.DataFrame:
    """The same with answers without each of the strongest sets."""
    tops = map(real_results.plan.top_name, real_results.plan.FRACTIONS)
    known = itertools.product((4, 5), tops)
    others = [{"prompt": n, "ablation": name, "score": 1.0, "draw": 0} for n, name in known]
    return pd.concat([table, pd.DataFrame(others)], ignore_index=True)


def test_questions_are_asked_with_all_sets_and_read_by_document(vlm, scores):
    made = [prompt(n) for n in range(2)]
    asked = [
        dataclasses.replace(
            each, task=real_questions.TASK, answer=f"String: {each.answer}", haystack=(7, number)
        )
        for number, each in enumerate(made)
    ]
    assert [len(table) for table in real_questions.answered(vlm, scores, asked)] == [4, 4]
    table = real_results.question_answers(scores, "")
    assert set(table["document"]) == {7}
    names = [answers.FULL_MODEL, "top 5%", "top 10%", RANDOM.format(0.05)]
    for number in range(2):
        assert set(table[table["question"] == number]["ablation"]) == {*names}
    assert table[table["ablation"] == names[-1]]["draw"].tolist() == [0, 1]
    assert table["score"].between(0, 1).all()


def test_times_are_of_the_stock_model_and_of_each_share(vlm, scores):
    table = real_streaming.timed(vlm, scores, lengths=[128])
    assert table["variant"].tolist() == ["stock", "top 5%", "top 10%"]
    assert table["dense_heads"].tolist() == [1, 7 / 128, 13 / 128]
    assert table["limit"].iloc[0] == pytest.approx(1)
    assert table["limit"].iloc[1] > table["limit"].iloc[2] > 1
    assert (table["low"] <= table["seconds"]).all()
    assert (table["seconds"] <= table["high"]).all()
    assert table["machine"].notna().all()


def test_the_loss_on_prose_is_the_model_s_own_and_changes_without_its_heads(vlm, scores):
    units = [encode(vlm, prompt(number)).ids for number in range(2)]
    ids = torch.stack([each[:96] for each in units])
    sets = real_prose.sets_of(scores)
    assert len([name for name, _ in sets if name.startswith("random")]) == 8
    table = real_prose.losses(vlm, ids, sets)
    assert len(table) == len(sets) * len(ids)
    means = table.groupby("ablation")["loss"].mean()
    own = vlm.model(input_ids=ids, labels=ids).loss.item()
    assert means["full model"] == pytest.approx(own, abs=1e-5)
    assert abs(means["top 10%"] - own) > 0.1
    assert table.set_index("ablation")["heads"]["rank 50% to 100%"].iloc[0] == 64
