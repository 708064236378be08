"""Scores of heads: selection and statistics against cases worked out by hand, and their files."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmheads import score_files, tables
from mmheads.heads import Head, HeadGeometry, format_heads, head_count
from mmheads.provenance import Provenance
from mmheads.scores import METADATA, HeadScores, concatenate, spearman, union_of_top

# Two examples, two layers, four heads. Means: layer 0: 0.4 0.1 -0.2 0.0, layer 1: 0.1 0.3 0.0 0.1
VALUES = [
    [[0.5, 0.2, -0.1, 0.1], [0.1, 0.3, 0.1, 0.0]],
    [[0.3, 0.0, -0.3, -0.1], [0.1, 0.3, -0.1, 0.2]],
]
GEOMETRY = HeadGeometry(2, 4, 2)


def make(values=VALUES, **fields) -> HeadScores:
    return HeadScores(np.array(values), **{"geometry": GEOMETRY, **fields})


def one(*layers, **fields) -> HeadScores:
    return HeadScores(np.array([layers]), **fields)


def test_mean_is_taken_over_examples():
    expected = [[0.4, 0.1, -0.2, 0.0], [0.1, 0.3, 0.0, 0.1]]
    np.testing.assert_allclose(make().mean, expected, atol=1e-7)


def test_top_takes_the_strongest_heads_and_ties_in_the_order_of_layer_then_head():
    assert str(make().top(count=2)) == "L0H0 L1H1"
    assert str(one([1.0, 2.0], [2.0, 1.0]).top(count=4)) == "L0H1 L1H0 L0H0 L1H1"


def test_top_rounds_the_number_of_heads_up():
    assert len(make().top(0.05)) == 1
    assert len(make().top(0.3)) == 3
    assert head_count(0.05, 1152) == 58
    assert head_count(0.05, 768) == 39
    assert head_count(0.07, 100) == 7  # 0.07 * 100 > 7 in binary


def test_top_counts_all_heads_but_selects_eligible_ones():
    scores = make(eligible=[[False] * 4, [True] * 4])
    assert str(scores.top(0.25)) == "L1H1 L1H0"


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
        make().top(fraction)


def test_more_heads_than_are_eligible_are_refused():
    with pytest.raises(ValueError, match="5 heads asked for, but 4 of the 8"):
        make(eligible=[[False] * 4, [True] * 4]).top(0.6)


def test_sparsity_of_a_worked_case():
    # positive means 4 3 2 1, total 10: 4 + 3 reach 5 and 6, 4 + 3 + 2 reach 9
    scores = one([4.0, -5.0, 3.0, 0.0], [2.0, 1.0, -1.0, 0.0])
    assert scores.sparsity(0.4) == 1 / 8
    assert scores.sparsity(0.5) == 2 / 8
    assert scores.sparsity(0.7) == 2 / 8
    assert scores.sparsity(0.9) == 3 / 8
    assert scores.sparsity(1.0) == 4 / 8
    np.testing.assert_allclose(scores.cumulative_mass(), [0.4, 0.7, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_sparsity_is_reached_exactly_despite_float32():
    assert one([0.3, 0.2, 0.5]).sparsity(0.5) == 1 / 3
    assert one([0.1] * 10).sparsity(0.3) == 0.3


def test_sparsity_counts_ineligible_heads_unless_told_otherwise():
    # 4 of layer 0 is half of 8; without layer 0, 3 of layer 1 is more than half of 4
    scores = one([4.0, 0.0], [3.0, 1.0], eligible=[[False, False], [True, True]])
    assert scores.sparsity(0.6) == 2 / 4
    assert scores.sparsity(0.6, eligible_only=True) == 1 / 4
    np.testing.assert_allclose(scores.cumulative_mass(eligible_only=True), [0.75, 1, 1, 1])


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, -0.5]])
def test_no_positive_mass_is_an_error_and_never_a_number(values):
    for scores in (one(values), one([*values, 1.0], eligible=[[True, True, False]])):
        with pytest.raises(ValueError, match="no head has a positive mean score"):
            scores.sparsity(0.5, eligible_only=True)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match="share of the mass"):
        make().sparsity(share)


def test_spearman_averages_ties():
    # ranks 1 2.5 2.5 4 and 1 2 3 4: d = 0 .5 -.5 0; Pearson of ranks = 4.5 / sqrt(4.5 * 5)
    agreement = spearman(one([1.0, 2.0, 2.0, 3.0]), one([1.0, 2.0, 3.0, 4.0]))
    assert agreement.rho == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert agreement.overlap == 1.0


def test_spearman_looks_at_eligible_heads_alone():
    eligible = [[True, True, True, False]]
    a, b = one([1.0, 2.0, 3.0, 9.0]), one([3.0, 2.0, 1.0, 9.0])
    assert spearman(a, b).rho == pytest.approx(0.2)  # 1 - 6 * (4 + 0 + 4 + 0) / (4 * 15)
    a, b = (dataclasses.replace(scores, eligible=eligible) for scores in (a, b))
    assert spearman(a, b) == (pytest.approx(-1.0), 0.0)


def test_spearman_refuses_what_has_no_order():
    with pytest.raises(ValueError, match="all eligible heads have the same score"):
        spearman(one([0.0, 0.0]), one([1.0, 2.0]))
    with pytest.raises(ValueError, match="same eligible heads"):
        spearman(one([1.0, 2.0], eligible=[[True, False]]), one([1.0, 2.0]))


def test_random_sets_are_seeded_eligible_and_of_the_size_asked_for():
    scores = make(eligible=[[False] * 4, [True] * 4])
    sets = scores.random(2, draws=50, seed=3)
    assert [str(s) for s in sets] == [str(s) for s in scores.random(2, draws=50, seed=3)]
    assert {len(s) for s in sets} == {2}
    assert {head.layer for s in sets for head in s} == {1}
    assert {head.head for s in sets for head in s} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="1 to 4 heads"):
        scores.random(5, draws=1, seed=0)


def test_kv_group_scores_are_means_over_eligible_heads():
    # layer 0: groups (0.4, 0.1) and (-0.2, 0.0), layer 1: (0.1, 0.3) and (0.0, 0.1)
    groups = make().by_kv_group()
    np.testing.assert_allclose(groups.mean, [[0.25, -0.1], [0.2, 0.05]], atol=1e-7)
    assert str(groups.top(count=2)) == "L0H0 L1H0"
    assert groups.sparsity(0.5) == 1 / 4
    without = make().exclude([Head(0, 1), Head(0, 2), Head(0, 3)]).by_kv_group()
    np.testing.assert_allclose(without.mean, [[0.4, -0.1], [0.2, 0.05]], atol=1e-7)
    assert without.eligible.tolist() == [[True, False], [True, True]]


def test_scores_outside_a_range_are_named():
    scores = make([[[0.0, 1.5, 0.0, 0.0], [0.0] * 4], [[0.0] * 4, [0.0, 0.0, -2.0, 1.0]]])
    assert format_heads(scores.out_of_range(-1, 1)) == "L0H1, L1H2"
    assert make().out_of_range(-1, 1) == ()


def test_every_head_can_be_made_eligible():
    scores = make(geometry=HeadGeometry(2, 4, 2, (1,)))
    assert str(scores.top(count=1)) == "L1H1"
    assert str(scores.all_eligible().top(count=1)) == "L0H0"


def test_excluded_heads_are_never_selected():
    assert str(make().exclude([Head(0, 0)]).top(count=1)) == "L1H1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": np.zeros((2, 4))}, r"expected \[example, layer, head\]"),
        ({"values": np.zeros((0, 2, 4))}, r"expected \[example, layer, head\]"),
        ({"values": np.full((1, 2, 4), np.nan)}, "scores of L0H0, L0H1.* are not finite"),
        ({"geometry": HeadGeometry(3, 4, 2)}, "the model has 3 x 4"),
        ({"eligible": np.ones((4, 2))}, "eligible has shape"),
        ({"metadata": pd.DataFrame({"task": ["text"] * 3})}, "3 rows for 2 examples and lacks"),
    ],
)
def test_scores_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HeadScores(**{"values": np.array(VALUES), "geometry": GEOMETRY, **fields})


def saved(path: Path) -> HeadScores:
    scores = saved_fields()
    scores.save(path)
    return scores


def saved_fields() -> HeadScores:
    return make(
        geometry=HeadGeometry(2, 4, 2, (1,)),
        metadata=pd.DataFrame(
            {"task": ["text"] * 2, "length": [128, 256], "depth": [0.0, 1.0], "haystack": [7, 7]}
        ),
        provenance=Provenance(model="toy", revision="abc", versions={"torch": "2.13.0"}),
    )


def test_scores_survive_a_round_trip(tmp_path):
    scores = saved(tmp_path / "scores.parquet")
    loaded = HeadScores.load(tmp_path / "scores.parquet", model="toy")
    np.testing.assert_array_equal(loaded.values, scores.values)
    np.testing.assert_array_equal(loaded.eligible, [[False] * 4, [True] * 4])
    pd.testing.assert_frame_equal(loaded.metadata, scores.metadata)
    assert (loaded.geometry, loaded.provenance) == (scores.geometry, scores.provenance)


def test_scores_of_another_model_are_refused(tmp_path):
    saved(tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="holds scores of 'toy', not of 'other'"):
        HeadScores.load(tmp_path / "scores.parquet", model="other")


def test_files_of_another_format_are_refused(tmp_path):
    path = tmp_path / "scores.parquet"
    path.write_text("no parquet")
    with pytest.raises(ValueError, match=r"scores.parquet is not a readable parquet file"):
        HeadScores.load(path)
    saved(path)
    table = pq.read_table(path)
    newer = table.schema.metadata[b"mmheads"].replace(b'"format":3', b'"format":99')
    pq.write_table(table.replace_schema_metadata({"mmheads": newer}), path)
    with pytest.raises(ValueError, match=r"scores.parquet has format 99, this version reads 3"):
        HeadScores.load(path)
    pq.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(ValueError, match=r"scores.parquet is not a readable parquet file"):
        HeadScores.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda about: about.pop("provenance"),
        lambda about: about.pop("geometry"),
        lambda about: about.pop("eligible"),
        lambda about: about.update(kind="answers"),
        lambda about: about.update(provenance=[]),
        lambda about: about.update(provenance={"colour": "red"}),
        lambda about: about.update(provenance={"model": 5}),
        lambda about: about.update(geometry={"layers": 3, "heads": 4, "kv_groups": 2}),
        lambda about: about["geometry"].update(layers=3),
        lambda about: about["geometry"].update(layers="2"),
        lambda about: about["geometry"].update(global_layers=5),
        lambda about: about.update(eligible="all"),
        lambda about: about.update(eligible=[[True]]),
    ],
)
def test_forged_files_are_one_error_that_names_the_file(tmp_path, damage, monkeypatch):
    path = tmp_path / "scores.parquet"
    write = tables.write_table

    def forged(target, scalars, arrays, about, **more):
        damage(about)
        write(target, scalars, arrays, about, **more)

    monkeypatch.setattr(score_files, "write_table", forged)
    saved(path)
    with pytest.raises(ValueError, match=r"scores\.parquet (is not a file of|holds scores that)"):
        HeadScores.load(path)


def test_cut_files_and_folders_are_refused_by_name(tmp_path):
    path = tmp_path / "scores.parquet"
    saved(path)
    content = path.read_bytes()
    for length in (0, 1, 4, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"scores\.parquet is not a readable parquet file"):
            HeadScores.load(path)
    for missing in (tmp_path, tmp_path / "none.parquet"):
        with pytest.raises(FileNotFoundError, match=f"{missing.name} is not a file"):
            HeadScores.load(missing)


def test_flipped_bits_are_refused_or_change_nothing(tmp_path):
    path = tmp_path / "scores.parquet"
    scores = saved(path)
    content = path.read_bytes()
    messages = []
    for place in np.random.default_rng(0).integers(0, 8 * len(content), 300):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            loaded = HeadScores.load(path)
        except ValueError as error:
            messages.append(str(error))
            continue
        np.testing.assert_array_equal(loaded.values, scores.values)
        pd.testing.assert_frame_equal(loaded.metadata, scores.metadata)
        assert (loaded.geometry, loaded.provenance) == (scores.geometry, scores.provenance)
    assert len(messages) > 150
    assert all("scores.parquet" in message for message in messages)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "scores.parquet"
    saved(path)
    before = path.read_bytes()

    def fail(table, where, **settings):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        saved(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def several() -> HeadScores:
    rows = [("text", 128, depth, seed) for seed in ("a", "b") for depth in (0.0, 1.0)]
    values = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3) / 100
    return HeadScores(
        values,
        metadata=pd.DataFrame(rows, columns=list(METADATA)),
        quantities={"raw": values + 0.5},
    )


def test_examples_are_taken_by_their_metadata():
    scores = several()
    ends = scores.select(task="text", depth=1.0)
    np.testing.assert_array_equal(ends.values, scores.values[[1, 3]])
    np.testing.assert_array_equal(ends["raw"].values, scores.values[[1, 3]] + 0.5)
    assert ends.metadata["haystack"].tolist() == ["a", "b"]
    with pytest.raises(ValueError, match=r"no example has \{'depth': 0.5"):
        scores.select(depth=0.5)
    with pytest.raises(KeyError, match="'null' was not recorded; there are raw"):
        scores["null"]


def test_examples_are_grouped_by_haystack():
    scores = several()
    units = scores.by_haystack()
    assert units.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(units[1], scores.values[2:])
    with pytest.raises(ValueError, match="expected equal numbers"):
        scores.take(np.array([0, 1, 2])).by_haystack()


def test_joined_scores_keep_every_example_and_are_made_alike():
    scores = several()
    joined = concatenate([scores.take(np.array([0])), scores.take(np.array([1, 2, 3]))])
    np.testing.assert_array_equal(joined.values, scores.values)
    np.testing.assert_array_equal(joined["raw"].values, scores["raw"].values)
    other = dataclasses.replace(scores, provenance=Provenance(model="another"))
    with pytest.raises(ValueError, match=r"model 'another', now ''"):
        concatenate([scores, other])


def own(lengths: list[int | None], winners: list[int], task: object = "mine") -> HeadScores:
    """Examples in each of which one head has all of the score."""
    values = np.eye(4, dtype=np.float32)[winners][:, None]
    metadata = pd.DataFrame(
        {"task": task, "length": lengths, "depth": None, "haystack": range(len(winners))}
    )
    return HeadScores(values, metadata=metadata)


def test_a_users_own_examples_all_choose_the_heads():
    assert str(union_of_top(own([0, 0, 0], [2, 2, 1]), 0.25)) == "L0H2"
    assert str(union_of_top(own([0, 0, 0], [2, 2, 1], None), 0.25)) == "L0H2"
    assert str(union_of_top(own([None, None, None], [2, 2, 1]), 0.25)) == "L0H2"


def test_a_grid_of_needles_chooses_at_its_longest_length():
    assert str(union_of_top(own([128, 128, 256], [2, 2, 1]), 0.25)) == "L0H1"
    assert str(union_of_top(own([128, 0, 0, 256], [2, 3, 3, 1]), 0.25)) == "L0H3"
    both = concatenate([own([128, 256], [0, 3], "text"), own([0, 0, 0], [1, 1, 2], "mine")])
    assert str(union_of_top(both, 0.25)) == "L0H3 L0H1"


def test_the_union_of_tasks_is_taken_at_their_longest_lengths():
    values = np.zeros((4, 2, 4), np.float32)
    values[0, 0, 1] = values[1, 1, 2] = values[2, 0, 3] = values[3, 1, 0] = 1
    metadata = pd.DataFrame(
        {"task": ["a", "a", "b", "b"], "length": [8, 16, 16, 8], "depth": 0.0, "haystack": 0}
    )
    scores = HeadScores(values, metadata=metadata)
    assert str(union_of_top(scores, 1 / 8)) == "L1H2 L0H3"


def test_a_selection_says_where_it_comes_from():
    scores = saved_fields()
    top = scores.top(0.25)
    assert (top.model, top.origin.revision, top.origin.task) == ("toy", "abc", "text")
    assert (top.origin.length, top.origin.rule) == ("128 + 256", "top 25% by mean score")
    assert top.scores == {head: pytest.approx(scores.mean[head]) for head in top}
    assert scores.bottom(2).origin.rule == "bottom 2 by mean score"


def test_frame_has_one_row_per_example_and_head():
    table = several().to_frame()
    assert len(table) == 4 * 2 * 3
    (row,) = (
        table[(table["haystack"] == "b") & (table["depth"] == 1) & (table["layer"] == 1)]
        .query("head == 2")
        .to_dict("records")
    )
    assert row["score"] == pytest.approx(0.23)
    assert row["raw"] == pytest.approx(0.73)


def test_released_format_is_best_first():
    released = several().to_released_json()
    assert released["head_score_list"][0] == ["1-2", pytest.approx(0.14)]
    assert len(released["head_score_list"]) == 6


def test_released_json_names_the_seed_of_the_shuffled_questions():
    made = Provenance(model="toy", settings={"shuffle_seed": 7})
    released = dataclasses.replace(several(), provenance=made).to_released_json()
    assert (released["args"]["seed"], released["args"]["model_name_or_path"]) == (7, "toy")


def test_bottom_heads_are_the_weakest_eligible():
    values = np.arange(32, dtype=float).reshape(1, 4, 8)
    eligible = np.ones((4, 8), dtype=bool)
    eligible[0] = False
    scores = HeadScores(values, geometry=HeadGeometry(4, 8, 4), eligible=eligible)
    assert scores.bottom(2).heads == (Head(1, 0), Head(1, 1))
    assert not len(scores.bottom(12) & scores.top(count=12))
    with pytest.raises(ValueError, match="25 heads asked for, expected 1 to 24"):
        scores.bottom(25)


def test_examples_are_selected_by_columns_that_exist():
    with pytest.raises(ValueError, match=r"metadata lack \['lenght'\]"):
        several().select(lenght=128)
