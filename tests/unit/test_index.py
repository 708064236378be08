"""The index gives what a full pass gives: eager attention over the whole prompt is the check."""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import example_prompts
import numpy as np
import pytest
import random_models
import torch

from mmheads import retrieval
from mmheads.attention import record_keys, stop_after
from mmheads.examples import Example
from mmheads.families import box_shares
from mmheads.heads import Head, HeadSet
from mmheads.models import load
from mmheads.pdfs import PageBox
from mmheads.prompts import encode, null_question
from mmheads.retrieval import DocumentIndex, PagePart, windows
from mmheads.retrieval import candidates as candidates_module
from mmheads.scores import HeadScores, Provenance
from mmheads.tasks import needles

TEXT = ("First the rain falls.", "Here the needle is hidden.", "Ask which rain falls ?")
QUESTION = "which rain falls"
BOXES = ((0, 0, 30, 40), (30, 0, 60, 40))


def candidates(family: str) -> list:
    if family == "qwen3":
        return list(TEXT)
    images = [
        example_prompts.picture(60, 40),
        example_prompts.picture(40, 60, 1),
        example_prompts.picture(32, 32, 2),
    ]
    return [images[0], (images[1], TEXT[1]), lambda: images[2]]


def parts(candidate) -> tuple:
    made = candidate() if callable(candidate) else candidate
    return made if isinstance(made, tuple) else (made,)


def some_heads(vlm, count: int = 5) -> HeadSet:
    """Not in the last layer, so that it need not run."""
    eligible = np.argwhere(vlm.geometry.eligible)
    eligible = eligible[eligible[:, 0] < max(1, vlm.geometry.layers - 1)]
    chosen = np.random.default_rng(0).permutation(eligible)[:count]
    return HeadSet(tuple(Head(*map(int, head)) for head in chosen), vlm.geometry, vlm.model_id)


def full_pass(vlm, given, question, *, instruction=""):
    """[head, token] mean over question tokens of eager attention, and the prompt."""
    context = tuple(part for candidate in given for part in parts(candidate))
    prompt = encode(vlm, Example(context=context, question=question, instruction=instruction))
    attention = example_prompts.eager_attention(vlm, prompt.own)
    return attention.mean(dim=2).numpy(), prompt


def expected_masses(vlm, heads, given, question, null="N/A", calibrated=True):
    """[head, candidate] from full passes with and without the question."""

    def sums(asked):
        attention, prompt = full_pass(vlm, given, asked)
        spans = iter(prompt.parts)
        columns = []
        for candidate in given:
            tokens = np.concatenate([next(spans).tokens for _ in parts(candidate)])
            columns.append([attention[head][tokens].sum() for head in heads])
        return np.array(columns).T

    found = sums(question)
    return found - sums(null_question(question, null)) if calibrated else found


@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_scores_equal_a_full_pass(family):
    vlm = example_prompts.vlm(family)
    heads, given = some_heads(vlm), candidates(family)
    index = DocumentIndex(vlm, heads, given)
    for asked in (QUESTION, "hidden needle", QUESTION):
        np.testing.assert_allclose(
            index.masses(asked), expected_masses(vlm, heads, given, (asked,)), atol=1e-5
        )
    ranking = index.rank(QUESTION)
    np.testing.assert_allclose(ranking.scores, index.masses(QUESTION).mean(0), atol=1e-6)
    assert ranking.order == retrieval.rank(ranking.scores)
    assert ranking.window == 3
    assert vlm.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", example_prompts.VISION)
def test_questions_with_images_equal_a_full_pass(family):
    vlm = example_prompts.vlm(family)
    heads, given = some_heads(vlm), candidates(family)
    index = DocumentIndex(vlm, heads, given)
    asked = ("which", example_prompts.picture(32, 32, 5), "?")
    refused = {"gemma3": "ask in words", "llava_onevision": "other tokens alone"}
    if family in refused:
        with pytest.raises(ValueError, match=refused[family]):
            index.masses(asked)
        return
    raw = expected_masses(vlm, heads, given, asked, calibrated=False)
    plain = expected_masses(vlm, heads, given, ("N/A",), calibrated=False)
    np.testing.assert_allclose(index.masses(asked, null_images="none"), raw - plain, atol=1e-5)
    np.testing.assert_allclose(
        index.masses(asked, null_images="pixels"),
        expected_masses(vlm, heads, given, asked),
        atol=1e-5,
    )


def test_windows_are_of_one_size_and_cover_all():
    for count in range(1, 40):
        for window in range(1, 12):
            for overlap in range(window):
                spread = candidates_module.spread(count, window, overlap)
                assert {len(each) for each in spread} == {len(spread[0])}
                assert len(spread[0]) <= window
                assert sorted({i for each in spread for i in each}) == list(range(count))
                for a, b in pairwise(spread):
                    assert len(set(a) & set(b)) >= overlap


def test_windows_are_passes_of_their_own_and_shared_candidates_are_averaged():
    vlm = example_prompts.vlm("qwen3_vl")
    heads, given = some_heads(vlm), candidates("qwen3_vl")
    index = DocumentIndex(vlm, heads, given, window=2, overlap=1)
    first, second = (expected_masses(vlm, heads, given[i : i + 2], (QUESTION,)) for i in (0, 1))
    middle = (first[:, 1] + second[:, 0]) / 2
    expected = np.stack([first[:, 0], middle, second[:, 1]], axis=1)
    np.testing.assert_allclose(index.masses(QUESTION), expected, atol=1e-5)


def test_length_normalisation_and_no_calibration():
    vlm = example_prompts.vlm("qwen3_vl")
    heads, given = some_heads(vlm), candidates("qwen3_vl")
    raw = DocumentIndex(vlm, heads, given).masses(QUESTION, calibrated=False)
    expected = expected_masses(vlm, heads, given, (QUESTION,), calibrated=False)
    np.testing.assert_allclose(raw, expected, atol=1e-5)
    assert (raw >= 0).all()
    _, prompt = full_pass(vlm, given, (QUESTION,))
    counts = [len(prompt.parts[0]), len(prompt.parts[1]) + len(prompt.parts[2])]
    counts.append(len(prompt.parts[3]))
    normalized = DocumentIndex(vlm, heads, given).masses(QUESTION, calibrated=False, normalize=True)
    np.testing.assert_allclose(normalized, raw / np.array(counts), atol=1e-6)


def test_all_heads_are_those_that_see_the_whole_context():
    vlm = example_prompts.vlm("gemma3")
    index = DocumentIndex(vlm, None, candidates("gemma3"))
    np.testing.assert_array_equal(index.heads.mask, vlm.geometry.eligible)


def test_regions_take_the_share_of_each_token():
    vlm = example_prompts.vlm("qwen3_vl")
    heads, given = some_heads(vlm), candidates("qwen3_vl")
    index = DocumentIndex(vlm, heads, given)
    regions = [PageBox(1, (100, 50, 300, 200), (400, 600)), PageBox.whole(0, (6, 4))]
    found = index.masses(QUESTION, regions, calibrated=False)
    attention, prompt = full_pass(vlm, given, (QUESTION,))
    shares = box_shares(prompt.boxes[1], (10, 5, 30, 20))
    expected = [attention[head][prompt.parts[1].tokens] @ shares for head in heads]
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    whole = index.masses(QUESTION, calibrated=False)[:, 0]
    np.testing.assert_allclose(found[:, 1], whole, atol=1e-6)
    with pytest.raises(ValueError, match=r"page=7.* covers no token of the 3 candidates"):
        index.masses(QUESTION, [PageBox.whole(7, (6, 4))])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_parts_of_candidates_are_ranked_beside_them(family):
    vlm = example_prompts.vlm(family)
    heads = some_heads(vlm)
    given: list = [(f"{TEXT[0]}\n\n", f"{TEXT[1]}\n\n"), (f"{TEXT[1]}\n\n",)]
    if family == "qwen3_vl":
        given[1] = (example_prompts.picture(60, 40), *given[1])
    index = DocumentIndex(vlm, heads, given)
    regions = [PagePart(page, part) for page, of in enumerate(given) for part in range(len(of))]
    found = index.masses("which rain falls", regions, calibrated=False)
    attention, prompt = full_pass(vlm, given, ("which rain falls",))
    expected = [[attention[h][part.tokens].sum() for part in prompt.parts] for h in heads]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    ranking = index.rank("which rain falls", regions)
    whole = index.rank("which rain falls")
    assert ranking.candidates.order == whole.order
    np.testing.assert_array_equal(ranking.candidates.scores, whole.scores)
    np.testing.assert_allclose(
        whole.scores, [ranking.scores[:2].sum(), ranking.scores[2:].sum()], atol=1e-5
    )
    table = ranking.table()
    best = ranking.order[0]
    assert (table["region"][0], table["candidate"][0]) == (best, regions[best].page)
    assert table["box"].isna().all()
    for wrong in (PagePart(1, 2), PagePart(0, -1), PagePart(2, 0)):
        with pytest.raises(ValueError, match=r"PagePart\(page=.* covers no token of the 2"):
            index.masses("which rain falls", [wrong])


def test_heat_adds_up_to_the_score():
    vlm = example_prompts.vlm("qwen3_vl")
    index = DocumentIndex(vlm, some_heads(vlm), candidates("qwen3_vl")[:1] * 3, window=2)
    ranking = index.rank(QUESTION)
    for candidate, (boxes, values) in ranking.heat.items():
        assert len(boxes) == len(values)
        assert values.sum() == pytest.approx(ranking.scores[candidate], abs=1e-6)


def test_a_question_that_runs_into_the_last_candidate_is_refused():
    vlm = example_prompts.vlm("qwen3")
    heads = some_heads(vlm)
    for last, null, question in (("rain fa", "N/A", "lls"), ("rain fa", "lls", "N/A")):
        with pytest.raises(ValueError, match=r"'lls'.* share a token"):
            DocumentIndex(vlm, heads, ["first", last]).rank(question, null=null)
    index = DocumentIndex(vlm, heads, ["first", "rain fa\n"])
    np.testing.assert_allclose(
        index.masses("lls"),
        expected_masses(vlm, heads, ["first", "rain fa\n"], ("lls",)),
        atol=1e-5,
    )


def test_regions_are_drawn_on_their_pages():
    vlm = example_prompts.vlm("qwen3_vl")
    images = [example_prompts.picture(60, 40, seed) for seed in range(2)]
    index = DocumentIndex(vlm, some_heads(vlm), images)
    regions = [PageBox(page, box, (60, 40)) for page in (0, 1) for box in BOXES]
    ranking = index.rank(QUESTION, regions)
    table = ranking.table()
    best = regions[ranking.order[0]]
    assert (table["candidate"][0], table["box"][0]) == (best.page, best.box)
    figure = ranking.picture([lambda image=image: image for image in images])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0].startswith(f"1: page {best.page + 1}, ")
    assert len(titles) == 2
    (rectangle,) = ranking.picture([lambda: images[0]] * 2, outlined=1).axes[0].patches
    left, top, right, bottom = best.box
    assert rectangle.get_bbox().extents == pytest.approx((left, top, right, bottom))
    counts = [len(axis.patches) for axis in figure.axes]
    assert counts == [2, 2]
    with pytest.raises(ValueError, match="candidate 0 has 2 images"):
        DocumentIndex(vlm, some_heads(vlm), [images]).masses(QUESTION, regions[:1])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "internvl", "smolvlm"])
def test_by_default_the_null_question_leaves_the_positions_of_images_empty(family):
    vlm = example_prompts.vlm(family)
    heads, given = some_heads(vlm), candidates(family)
    index = DocumentIndex(vlm, heads, given)
    asked = ("which", example_prompts.picture(32, 32, 5), "?")
    raw = index.masses(asked, calibrated=False)
    found = {name: index.masses(asked, null_images=name) for name in retrieval.NULL_IMAGES}
    np.testing.assert_array_equal(index.masses(asked), found["placeholders"])
    ranking = index.rank(asked)
    np.testing.assert_allclose(ranking.scores, found["placeholders"].mean(0), atol=1e-6)
    nulls = {name: raw - masses for name, masses in found.items()}
    other = ("which", example_prompts.picture(32, 32, 6), "?")
    for name, depends in (("none", False), ("placeholders", False), ("pixels", True)):
        null = index.masses(other, calibrated=False) - index.masses(other, null_images=name)
        assert np.allclose(null, nulls[name], atol=1e-6) != depends, name
    assert abs(nulls["placeholders"] - nulls["none"]).max() > 1e-5


def test_settings_of_a_ranking_leave_the_index_as_it_was():
    vlm = example_prompts.vlm("qwen3_vl")
    heads, given = some_heads(vlm), candidates("qwen3_vl")
    index = DocumentIndex(vlm, heads, given)
    before = index.masses(QUESTION)
    np.testing.assert_allclose(
        index.masses(QUESTION, null="hidden needle"),
        expected_masses(vlm, heads, given, (QUESTION,), null="hidden needle"),
        atol=1e-5,
    )
    top = index.rank(QUESTION, null="hidden needle", normalize=True, top=2)
    assert top.order == index.rank(QUESTION, null="hidden needle", normalize=True).order[:2]
    assert len(top.table()) == 2
    assert len(top.scores) == 3
    np.testing.assert_array_equal(index.masses(QUESTION), before)
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"top is {wrong}"):
            index.rank(QUESTION, top=wrong)
    for wrong in ("", " ", None):
        with pytest.raises(ValueError, match="the null question is"):
            index.rank(QUESTION, null=wrong)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("abc", TypeError, "candidates are 'abc'"),
        (b"abc", TypeError, "candidates are b'abc'"),
        (Path("d.pdf"), TypeError, r"candidates are .*d\.pdf"),
        ({"page": "a"}, TypeError, "candidates are {'page'"),
        (iter(["a"]), TypeError, "candidates are <"),
        (None, TypeError, "candidates are None"),
        (example_prompts.picture(32, 32), TypeError, "candidates are <PIL"),
        ([], ValueError, "there is no candidate"),
        (["a\n", "page 1.PNG"], ValueError, "candidate 1 is 'page 1.PNG', the name of a file"),
        (["a\n", Path("b.png")], ValueError, "candidate 1 is 'b.png', the name of a file"),
        ([lambda: Path("b.png")], ValueError, "candidate 0 is 'b.png', the name of a file"),
        ([{"image": "b"}], TypeError, "candidate 0 holds {'image': 'b'} .type dict"),
        ([{"a", "b"}], TypeError, "candidate 0 holds {"),
        ([5], TypeError, "candidate 0 holds 5 .type int"),
        ([lambda: None], TypeError, "candidate 0 holds None"),
        ([np.zeros((4, 4, 3))], TypeError, "candidate 0 holds array"),
        (["rain falls", ""], ValueError, "candidate 1 has no token"),
        (["rain falls", ()], ValueError, "candidate 1 has no token"),
    ],
)
def test_what_is_no_list_of_candidates_is_refused(given, error, message):
    vlm = example_prompts.vlm("qwen3_vl")
    with pytest.raises(error, match=message):
        DocumentIndex(vlm, some_heads(vlm), given)


def test_questions_regions_and_heads_of_another_type_are_refused():
    vlm = example_prompts.vlm("qwen3_vl")
    index = DocumentIndex(vlm, some_heads(vlm), candidates("qwen3_vl"))
    for question in (5, None, {"image": "q.png"}, ("which", 5), Path("q.png")):
        with pytest.raises(TypeError, match="the question holds"):
            index.rank(question)
    for regions, message in (
        ("page", "regions are"),
        ([(0, 0, 1, 1)], "a region is"),
        (5, "are 5"),
    ):
        with pytest.raises(TypeError, match=message):
            index.rank(QUESTION, regions)
    with pytest.raises(ValueError, match="there is no region to rank"):
        index.rank(QUESTION, [])
    for heads in ([Head(0, 1)], "L0H1"):
        with pytest.raises(TypeError, match="expected a HeadSet"):
            DocumentIndex(vlm, heads, ["a"])
    for window in (2.5, "2", None, 0, -1):
        with pytest.raises(ValueError, match="windows of"):
            DocumentIndex(vlm, None, ["a", "b"], window=window)


def test_pages_that_a_sequence_makes_on_demand_are_made_once():
    class Pages(Sequence):
        made: ClassVar[list] = []

        def __len__(self):
            return 3

        def __getitem__(self, number):
            self.made.append(number)
            return example_prompts.picture(60, 40, number)

    vlm = example_prompts.vlm("qwen3_vl")
    DocumentIndex(vlm, some_heads(vlm), Pages(), window=2)
    assert sorted(Pages.made) == [0, 1, 1, 2] or sorted(Pages.made) == [0, 1, 2]


def test_attention_that_is_not_finite_is_refused_with_its_layer():
    vlm = example_prompts.vlm("qwen3")
    broken = dataclasses.replace(vlm, model=copy.deepcopy(vlm.model))
    deep = HeadSet((Head(1, 1), Head(0, 0)), vlm.geometry, vlm.model_id)
    index = DocumentIndex(broken, deep, list(TEXT))
    with torch.no_grad():
        broken.attentions[1].q_proj.weight[0] = torch.nan
        broken.attentions[1].q_proj.weight[-1] = torch.nan
    everything = HeadSet(tuple(vlm.every_head), vlm.geometry, vlm.model_id)
    for run in (
        lambda: DocumentIndex(broken, everything, list(TEXT)),
        lambda: DocumentIndex(broken, None, list(TEXT)),
    ):
        with pytest.raises(ValueError, match=r"queries of L1H0, .* are not finite"):
            run()
    with torch.no_grad():
        broken.attentions[0].q_proj.weight[:] = torch.inf
    for ask in (index.rank, index.masses):
        with pytest.raises(ValueError, match=r"queries of L0H0, .* are not finite"):
            ask(QUESTION)
    with pytest.raises(ValueError, match=r"scores of candidates \[1\] are not finite"):
        retrieval.rank(np.array([0.1, np.nan]))


def test_heads_of_other_weights_are_used_with_a_warning_that_names_both():
    vlm = dataclasses.replace(example_prompts.vlm("qwen3"), revision="new weights")
    values = np.random.default_rng(0).random((3, vlm.geometry.layers, vlm.geometry.heads))
    made = Provenance(model=vlm.model_id, revision="old weights")
    scores = HeadScores(values, geometry=vlm.geometry, provenance=made)
    with pytest.warns(
        UserWarning, match="weights old weights of qwen3 are used with its weights new weights"
    ):
        DocumentIndex(vlm, retrieval.union_of_top(scores, 0.1), list(TEXT))
    same = dataclasses.replace(vlm, revision="old weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DocumentIndex(same, retrieval.union_of_top(scores, 0.1), list(TEXT)).rank(QUESTION)


def test_regions_in_relative_coordinates_are_warned_about():
    vlm = example_prompts.vlm("qwen3_vl")
    index = DocumentIndex(vlm, some_heads(vlm), candidates("qwen3_vl"))
    relative = [PageBox(0, (0.1, 0.1, 0.4, 0.3), (60, 40)), PageBox.whole(1, (40, 60))]
    with pytest.warns(UserWarning, match=r"1 of 2 regions cover less than 0.01 of a token.*0\.4"):
        index.rank(QUESTION, relative)


def test_nothing_is_run_for_heads_of_another_model(monkeypatch):
    vlm = example_prompts.vlm("qwen3")
    other = some_heads(example_prompts.vlm("qwen3_vl"))
    monkeypatch.setattr(windows, "prefill", None)
    with pytest.raises(ValueError, match="cannot be used to rank in qwen3"):
        DocumentIndex(vlm, other, ["a"])


def test_what_cannot_be_indexed_or_asked_is_said():
    vlm = example_prompts.vlm("qwen3_vl")
    heads = some_heads(vlm)
    index = DocumentIndex(vlm, heads, candidates("qwen3_vl"))
    for question in ("", "  ", ()):
        with pytest.raises(ValueError, match="the question is empty"):
            index.rank(question)
    with pytest.raises(ValueError, match="there is no candidate to rank"):
        DocumentIndex(vlm, heads, [])
    with pytest.raises(ValueError, match="windows of 2 candidates that overlap by 2"):
        DocumentIndex(vlm, heads, ["a", "b"], window=2, overlap=2)
    with pytest.raises(ValueError, match="keep is 'tape'"):
        DocumentIndex(vlm, heads, ["a"], keep="tape")
    with pytest.raises(ValueError, match="null_images is 'blank'"):
        index.masses(QUESTION, null_images="blank")
    with pytest.raises(ValueError, match="candidate 1 has no token"):
        DocumentIndex(vlm, heads, ["rain falls", " "])
    with pytest.raises(TypeError, match=r"candidate 1 holds 3 .*expected texts and images"):
        DocumentIndex(vlm, heads, ["rain falls", (3,)])
    with pytest.raises(ValueError, match="cannot be used to rank in qwen3_vl"):
        DocumentIndex(vlm, some_heads(example_prompts.vlm("gemma3")), ["a"])
    with pytest.raises(ValueError, match="there is no head to rank with"):
        DocumentIndex(vlm, HeadSet((), vlm.geometry), ["a"])
    assert vlm.text_config._attn_implementation == "sdpa"


def test_a_call_ends_at_the_deepest_layer_that_is_wanted():
    vlm = example_prompts.vlm("qwen3")
    ran = []
    for number, layer in enumerate(vlm.decoder.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    ids = torch.arange(6)[None]
    heads = HeadSet(((0, 0), (1, 1)), vlm.geometry, vlm.model_id)
    with torch.no_grad():
        stop_after(vlm, {1: lambda call: call.output}, lambda: vlm.model(input_ids=ids))
        keys = record_keys(vlm, torch.tensor([5]), heads, lambda: vlm.model(input_ids=ids))
    assert ran == [0, 0]
    assert keys.shape == (2, 6)
    np.testing.assert_allclose(keys.sum(1), 1, rtol=1e-5)


def test_a_question_past_the_models_positions_is_refused():
    vlm = example_prompts.vlm("qwen3")
    index = DocumentIndex(vlm, None, ["a page\n", "another page\n"])
    vlm.text_config.max_position_embeddings = 200
    with pytest.raises(ValueError, match="qwen3 takes 200"):
        index.rank("which " * 400)


def test_attention_that_is_not_finite_does_not_rank():
    vlm = example_prompts.vlm("qwen3")
    index = DocumentIndex(vlm, None, ["a page\n", "another page\n"])
    vlm.attentions[1].q_proj.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match=r"queries of L1H0, .* are not finite"):
        index.rank("which page ?")


def test_the_tiny_model_finds_the_page_and_the_block():
    vlm = load("tiny-qwen3-vl-m")
    examples = [needles.document(12, index=i, split="test") for i in range(6)]
    heads = HeadSet.load("tiny-qwen3-vl-m")
    right = []
    for example in examples:
        index = DocumentIndex(vlm, heads, list(example.context))
        blocks = [
            PageBox(region.part, region.box, example.context[region.part].size)
            for region in example.candidates["layout"]
        ]
        evidence = example.evidence[0]
        best = blocks[index.rank(example.question, blocks).order[0]]
        page = index.rank(example.question).order[0]
        right += [page == evidence.part, (best.page, best.box) == (evidence.part, evidence.box)]
    assert np.mean(right) >= 0.75
