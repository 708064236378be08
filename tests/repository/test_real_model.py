"""The pretrained text model: its file, its shipped results, and what is said of it."""

import json
import os
import re
import textwrap
from pathlib import Path

import example_prompts
import numpy as np
import pandas as pd
import pytest
import torch
from pdf_writer import PageSpec, text, write_pdf

from cluster import (
    real_documents,
    real_model,
    real_questions,
    real_ranking,
    real_results,
    real_single,
    real_streaming,
)
from mmheads import answers, causal, cli, paths, scoring, store
from mmheads.heads import HeadSet
from mmheads.models import VLM, load
from mmheads.pdfs import Page
from mmheads.prompts import encode
from mmheads.provenance import hash_json
from mmheads.retrieval import windows
from mmheads.tables import read_table
from mmheads.tasks import corpus, natural_needles
from mmheads.tasks.mmdocir import AnnotatedDocument, Question
from mmheads.tasks.mmlongbench_docs import question_answer

FILE = os.environ.get("MMHEADS_REAL_LM", "")
NOT_HERE = "MMHEADS_REAL_LM names no GGUF file of the pretrained text model"
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _nothing_is_shipped() -> None:
    """These tests read the results that the repository ships."""


@pytest.fixture(scope="module")
def vlm() -> VLM:
    if not Path(FILE).is_file():
        pytest.skip(NOT_HERE)
    return load(FILE, device="cpu")


@pytest.fixture(scope="module")
def scores():
    every = min(real_results.shipped_scores().items(), key=lambda item: len(item[0]))[1]
    return real_model.of_search(every)


def shipped(kind: str):
    """The shipped file of a kind."""
    (path,) = (real_results.store.SHIPPED / kind).glob(f"{real_results.MODEL}-*.parquet")
    return path


def test_the_heads_are_found_on_the_first_haystacks_and_not_on_the_longest_prompts(scores):
    of = scores.metadata
    assert sorted(set(of["length"])) == list(real_model.LENGTHS)
    numbers = of["haystack"].map(lambda text: json.loads(text)[2])
    assert sorted(set(numbers)) == list(range(real_model.HAYSTACKS))
    assert len(of) == 6 * len(real_model.LENGTHS) * real_model.HAYSTACKS


def test_the_shipped_heads_are_those_of_the_shipped_scores(scores):
    listed = HeadSet.load(real_results.MODEL)
    top = scores.top(real_model.MAIN)
    assert len(listed) == 17
    assert set(listed) == set(top)
    for head in listed:
        assert listed.scores[head] == pytest.approx(top.scores[head], abs=1e-4)
    assert listed.origin.revision == scores.provenance.revision


def test_each_random_set_is_asked_at_all_depths_and_each_prompt_with_as_many_sets():
    for draws in real_model.RANDOM_SETS.values():
        parts = [real_model.part_of(draw) for draw in range(draws)]
        assert {tuple(sorted(prompt % 6 for prompt in part)) for part in parts} == {(*range(6),)}
        asked = np.bincount(np.concatenate(parts), minlength=real_model.PROMPTS)
        assert (asked == draws * 6 // real_model.PROMPTS).all()


def test_the_rank_among_random_sets_is_that_of_the_part_in_which_most_do_as_much_harm():
    name = real_model.random_name(0.1)
    right = {0: [1, 1, 0, 0, 0, 0], 1: [1, 1, 1, 0, 0, 0]}  # of the strongest heads, by part
    rows = [
        {"prompt": prompt, "ablation": ablation, "draw": 0, "score": score}
        for prompt, score in enumerate(right[0] + right[1])
        for ablation, score in (("full model", 1), ("top 10%", score))
    ]
    rows += [  # the first set leaves 4 of 6 right, the second 3, the others all
        {"prompt": prompt, "ablation": name, "draw": draw, "score": prompt % 6 >= (2, 3)[draw]}
        if draw < 2
        else {"prompt": prompt, "ablation": name, "draw": draw, "score": 1}
        for draw in (0, 1, 8, 9)
        for prompt in real_model.part_of(draw)
    ]
    rows += [{"prompt": 7, "ablation": name, "draw": 0, "score": 0}]  # not of its part
    rows += [
        {"prompt": prompt, "ablation": real_model.top_name(share), "draw": 0, "score": 1}
        for prompt in range(12)
        for share in (0.01, 0.02, 0.05)
    ]
    told = pd.DataFrame(real_results.answer_rows(pd.DataFrame(rows).astype({"score": float})))
    told = told[told["about"] == name].set_index("quantity")
    harm = told.loc["random sets that do as much harm"]
    assert (harm["value"], harm["n"], harm["p"]) == (1, 4, 2 / 5)
    beside = told.loc["random sets that do as much harm on the same prompts"]
    assert (beside["value"], beside["n"]) == (1, 4)
    assert told.loc["answers without random sets", "value"] == 24
    lost = told.loc["points lost to the selected heads"]
    assert (lost["n"], lost["value"]) == (12, pytest.approx((12 - 2.5 - 5) / 12))


def test_the_committed_numbers_are_those_of_the_shipped_results():
    committed = pd.read_csv(real_results.TABLE, encoding="utf-8")
    again = real_results.table()
    pd.testing.assert_frame_equal(again, committed, check_dtype=False, rtol=1e-9)


def test_prompts_with_dense_heads_have_the_whole_model_and_most_have_random_heads_beside(scores):
    table = real_results.dense_answers(scores)
    assert set(table["share"]) == set(real_streaming.SHARES)
    for (_, prompt), part in table.groupby(["share", "haystack"]):
        kinds = {answers.FULL_MODEL, real_results.DENSE}
        kinds |= {real_results.RANDOM} if part["paired"].all() else set()
        assert (set(part["ablation"]), len(part)) == (kinds, len(kinds)), prompt
        assert part["draw"].max() in (0, prompt), "a random set of its own"
    assert set(table[table["inside"]]["haystack"] % 6) == {5}
    assert table[table["paired"]]["haystack"].nunique() > 8


def test_means_over_questions_are_resampled_by_document():
    index = pd.MultiIndex.from_tuples(
        [(0, 0), (1, 0), (1, 1), (1, 2)], names=["document", "question"]
    )
    row = real_results._of_documents("lost on real questions", "x", pd.Series([1, 0, 0, 0], index))
    assert (row["value"], row["n"]) == (0.25, 4)
    assert (row["low"], row["high"]) == (0, 1)  # one document may be drawn twice
    assert row["p"] == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("204", "Integer: 204"),
        ("714.3", "Float: 714.3"),
        ("29%", "String: 29%"),
        ("['Fact Checker', 'x']", 'List: ["Fact Checker", "x"]'),
        (" Rick Scott ", "String: Rick Scott"),
        ("01983 873655", "String: 01983 873655"),
    ],
)
def test_answers_of_documents_are_typed_for_the_rule(answer, expected):
    assert real_questions.typed(answer) == expected


@pytest.mark.parametrize(
    ("answer", "pages", "shown"),
    [
        ("Rick Scott", (1,), [0, 1, 2]),
        ("the start", (0,), [0, 1]),
        ("the end!", (3,), [2, 3]),
        ("Rick Scott", (0,), None),  # it stands on another page
        ("Rick Scott", (1, 2), None),
        ("Rick", (2,), None),  # only as a part of a word
        ("2", (3,), None),  # in many texts by chance
    ],
)
def test_questions_are_those_whose_answer_the_model_reads(answer, pages, shown):
    texts = ["The start.", "Governor Rick Scott", "rickety", "The end, 2"]
    pages_of = [Page(n, lambda text=text: text, lambda: None) for n, text in enumerate(texts, 1)]
    document = AnnotatedDocument("a.pdf", pages_of)
    example = real_questions._example(document, Question("Who?", answer, pages), (3, 4))
    if shown is None:
        assert example is None
        return
    *context, _ = example.context
    assert context == [f"Page {n + 1}:\n{texts[n]}\n\n" for n in shown]
    (gold,) = example.evidence
    assert context[gold.part] == f"Page {pages[0] + 1}:\n{texts[pages[0]]}\n\n"
    assert (example.answer, example.haystack) == (f"String: {answer}", (3, 4))


@slow
def test_the_file_holds_the_model_whose_results_are_shipped(vlm):
    assert vlm.model_id == real_results.MODEL
    assert vlm.revision == HeadSet.load(real_results.MODEL).origin.revision
    assert (vlm.geometry.layers, vlm.geometry.heads, vlm.geometry.kv_groups) == (24, 14, 2)
    assert vlm.is_text_only


REVENUES = {"Northwind": 1204, "Halvorsen": 388, "Belmonte": 97, "Okafor": 615, "Tanaka": 842}


@slow
def test_a_pdf_is_ranked_by_the_shipped_heads_and_its_index_answers_later_questions(
    vlm, tmp_path, capsys, monkeypatch
):
    """The pages of a report as texts, of one company each, and the list that is shipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmheads.models.load", lambda name, **_: {FILE: vlm}[name])
    sentences = [" ".join(each) for each in corpus.shipped().paragraphs]
    filler = [re.sub(r"[()\\]", "", each) for each in sentences if each.isascii()]
    pages = []
    for number, (name, revenue) in enumerate(REVENUES.items()):
        lines = textwrap.wrap(" ".join(filler[3 * number : 3 * number + 3]), 80)
        lines[5:5] = [f"The revenue of {name} in 2019 was {revenue} million dollars."]
        shown = (text(line, 60, 740 - 14 * row, 10) for row, line in enumerate(lines[:45]))
        pages.append(PageSpec("\n".join(shown)))
    write_pdf(tmp_path / "report.pdf", pages)
    command = ["rank", "report.pdf", "--model", FILE, "--index", "report.index", "--json"]
    for place, name in ((2, "Halvorsen"), (5, "Tanaka")):
        question = f"What was the revenue of {name} in 2019?"
        assert cli.main([*command, "--question", question]) == 0
        printed = capsys.readouterr()
        assert "17 heads of qwen2.5-coder-0.5b" in printed.err
        assert "5 pages as texts in windows of 5" in printed.err
        (answer,) = json.loads(printed.out)["questions"]
        assert answer["pages"][0]["page"] == place
        monkeypatch.setattr(windows, "_run_window", None)  # all that follows is in the file
    assert "going on with report.index" in printed.err


@slow
def test_masses_are_those_of_eager_attention(vlm):
    example = natural_needles.for_model(vlm).make("text", 256, 0.4, haystack=5)
    prompt = encode(vlm, example)
    (score,) = (scoring.score_heads(vlm, [example], progress=False).quantities["raw"],)
    attention = example_prompts.eager_attention(vlm, prompt.own)
    evidence = torch.from_numpy(prompt.own.weights(prompt.own.evidence))
    expected = (attention.float() @ evidence).mean(dim=-1)
    np.testing.assert_allclose(score[0], expected.numpy(), atol=1e-4)
    assert expected.max() > 0.1


@slow
def test_three_shipped_examples_are_scored_again(vlm):
    _, scalars, arrays = read_table(shipped("scores"))
    rows = [row | {"place": place} for place, row in enumerate(scalars.to_pylist())]
    for row in np.random.default_rng(0).choice(rows, 3, replace=False):
        seed, split, haystack, _ = json.loads(row["haystack"])
        source = natural_needles.for_model(vlm, seed=seed)
        split = natural_needles.SPLITS[split]
        where = {"haystack": haystack, "split": split}
        example = source.make(row["task"], row["length"], row["depth"], **where)
        assert example.fingerprint() == row["key"]
        again = scoring.score_heads(vlm, [example], progress=False)
        for name in scoring.MASSES:
            before = arrays[name][row["place"]]
            np.testing.assert_allclose(again[name].values[0], before, atol=1e-4, err_msg=name)


@slow
def test_an_answer_changes_without_the_strongest_tenth_of_the_heads(vlm, scores):
    table = real_results.shipped_answers(scores)
    known = table.pivot_table(index="prompt", columns="ablation", values="score")
    lost = known.index[(known[answers.FULL_MODEL] == 1) & (known["top 10%"] == 0)]
    example = real_model.prompts(vlm)[lost[0]]
    top = {"top 10%": scores.top(0.1)}
    settings = {"max_new_tokens": real_model.NEW_TOKENS, "metric": natural_needles.score}
    again = answers.answer(vlm, [example], top, folder=None, progress=False, **settings)
    assert dict(zip(again["ablation"], again["score"], strict=True)) == {
        answers.FULL_MODEL: 1,
        "top 10%": 0,
    }
    assert again["prediction"].nunique() == 2


@slow
def test_the_effect_of_a_single_head_is_measured_again(vlm, scores):
    about, scalars, arrays = read_table(shipped("effects"))
    keys, effects = scalars["key"].to_pylist(), arrays["nats"]
    assert about["provenance"]["revision"] == vlm.revision
    example = real_single.examples(vlm)[0]
    strongest = scores.top(count=real_single.STRONGEST)
    key = hash_json([example.fingerprint(), example.answer, "effect", *sorted(map(str, strongest))])
    before = effects[keys.index(key)]
    assert (np.isnan(before) == ~strongest.mask).all()
    one = scores.top(count=1)
    (again,) = causal.single_head_effects(vlm, [example], heads=one, progress=False)
    np.testing.assert_allclose(again[one.mask], before[one.mask], atol=1e-3)


@slow
@pytest.mark.skipif(paths.real_docs("") is None, reason="the real documents are not here")
def test_the_committed_rankings_are_those_of_the_shipped_attention():
    again = real_ranking.tables(real_documents.documents(), None)
    for path, table in zip((real_ranking.TABLE, real_ranking.BLOCKS), again, strict=True):
        committed = pd.read_parquet(path).fillna(np.nan)
        without = committed["method"] != "all-MiniLM-L6-v2"
        pd.testing.assert_frame_equal(table, committed[without].reset_index(drop=True), rtol=1e-9)


@slow
@pytest.mark.skipif(paths.real_docs("") is None, reason="the real documents are not here")
def test_the_attention_to_the_pages_of_a_shipped_document_is_recorded_again(vlm, tmp_path):
    name = "0e94b4197b10096b1f4c699701570fbf.pdf"  # 15 pages with little text
    (document,) = (each for each in real_documents.documents() if each.name == name)
    texts = real_documents.texts_of(document)
    asked = [question.text for question in document.questions]
    with real_documents.results(vlm) as shipped_rows:
        before = real_ranking.measured(texts, asked, shipped_rows)
    with store.Results("masses", shipped_rows.provenance, {}, tmp_path, []) as kept:
        real_documents.measure(vlm, kept, document)
        again = real_ranking.measured(texts, asked, kept)
    assert len(before) == len(document.questions)
    for (_, old), (_, new) in zip(before, again, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4)


@slow
def test_only_needles_at_the_last_depth_are_inside_the_window(vlm):
    for example in real_model.prompts(vlm):
        prompt = encode(vlm, example)
        needle = np.flatnonzero(prompt.weights(prompt.evidence))
        inside = prompt.question[0] - needle.max() < real_streaming.WINDOW
        assert inside == (example.depth == 1), example.depth


@slow
def test_an_answer_with_few_dense_heads_is_given_again(vlm, scores):
    table = real_results.shipped_answers(scores, dense=True)
    before = table[table["ablation"] == "top 10%"].iloc[0]
    again = real_streaming.answered(
        vlm,
        [real_model.prompts(vlm)[before["prompt"]]],
        {"top 10%": scores.top(0.1)},
        folder=None,
    )
    assert again.set_index("ablation")["score"]["top 10%"] == before["score"]


@slow
@pytest.mark.skipif(paths.real_docs("") is None, reason="the real documents are not here")
def test_an_answer_about_a_real_document_is_given_again(vlm, scores):
    table = real_results.question_answers(scores)
    before = table[table["ablation"] == "top 5%"].iloc[0]
    which = (before["document"], before["question"])
    (example,) = (each for each in real_questions.examples() if each.haystack == which)
    settings = {"max_new_tokens": real_questions.NEW_TOKENS, "metric": question_answer}
    top = {"top 5%": scores.top(0.05)}
    again = answers.answer(vlm, [example], top, folder=None, progress=False, **settings)
    assert again.set_index("ablation")["prediction"]["top 5%"] == before["prediction"]
