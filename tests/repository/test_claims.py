"""Claims of the notebooks: their numbers are those of the committed figures, and only those."""

import csv
import json
import re
import shutil
import string

import figure_data
import make_claims
import pandas as pd
import pytest

from mmheads import figures, paths

CLAIMED = [*make_claims.FACTS]
NAMES = "|".join(
    (
        r"Qwen3-VL|Gemma 3|BM25|all-MiniLM-L6-v2|Recall@1",
        r"L\d+H\d+|arXiv \d{4}\.\d{5}|Figs?\. \d+|Tables? \d+",
    )
)
NUMBER_WORDS = "two three four five six seven eight nine ten eleven twelve twice thirds quarter"


def rows(name):
    """The rows of a figure's data, read without pandas."""
    with (paths.FIGURES / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def number(row, column):
    return float(row[column])


def chosen(name, **where):
    return [row for row in rows(name) if all(row[key] == str(v) for key, v in where.items())]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The data of the figures in a folder of their own, from which the claims are then made."""
    for path in [*paths.FIGURES.glob("*.csv"), paths.FIGURES / "manifest.json"]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget():
    figure_data.data.cache_clear()
    figure_data._parameters.cache_clear()


def change(path, edit):
    """Replace a file by what `edit` makes of its table."""
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    edit(table).to_csv(path, index=False)
    figure_data.data.cache_clear()


def test_every_notebook_has_a_claim_in_words_and_numbers():
    notebooks = [path.stem for path in sorted(paths.NOTEBOOKS.glob("*.ipynb"))]
    assert notebooks == CLAIMED == [*make_claims.WORDS]


@pytest.mark.parametrize("notebook", CLAIMED)
def test_the_claim_of_a_notebook_is_that_of_the_committed_data(notebook):
    content = make_claims.notebook_path(notebook).read_text(encoding="utf-8")
    assert make_claims.with_claim(content, make_claims.text(notebook)) == content, (
        "run python docs/make_claims.py"
    )


@pytest.mark.parametrize("notebook", CLAIMED)
def test_the_words_of_a_claim_hold_no_number_of_their_own(notebook):
    words = "".join(text for text, *_ in string.Formatter().parse(make_claims.WORDS[notebook]))
    words = re.sub(NAMES, "", words)
    assert re.findall(r"\S*\d\S*", words) == []
    assert {*NUMBER_WORDS.split()} & {*re.findall(r"\w+", words.lower())} == set()


@pytest.mark.parametrize("notebook", CLAIMED)
def test_every_number_that_is_computed_is_in_the_claim(notebook):
    fields = {name for _, name, *_ in string.Formatter().parse(make_claims.WORDS[notebook]) if name}
    assert fields == make_claims.FACTS[notebook]().keys()


@pytest.fixture
def read_by(copied, monkeypatch):
    """Names the data that a claim is made from."""
    read, seen = pd.read_csv, []

    def watched(path, **settings):
        seen.append(path)
        return read(path, **settings)

    def names(notebook):
        forget()
        seen.clear()
        with monkeypatch.context() as patched:
            patched.setattr(pd, "read_csv", watched)
            make_claims.text(notebook)
        return {path.stem for path in seen if path.parent == copied}

    return names


@pytest.mark.parametrize("notebook", CLAIMED)
def test_a_claim_follows_every_file_that_it_is_made_from(notebook, copied, read_by):
    names, before = read_by(notebook), make_claims.text(notebook)
    committed = {entry["file"] for entry in figures.manifest()}
    assert names
    for name in names:
        path = copied / f"{name}.csv"
        assert path.name in committed, "a claim needs data that not everybody has"
        original, outcomes = path.read_bytes(), []
        for edit in (lambda table: table.apply(smaller), lambda table: table[len(table) // 2 :]):
            change(path, edit)
            outcomes.append(outcome(notebook))
            path.write_bytes(original)
        assert [text for text in outcomes if text != before], name


def smaller(column):
    """A column with other numbers, or with other answers."""
    if pd.api.types.is_numeric_dtype(column):
        return column * 0.4 if pd.api.types.is_float_dtype(column) else column // 2
    return column.replace({"yes": "no"})


def outcome(notebook):
    """The claim, or the error that says why there is none."""
    try:
        return make_claims.text(notebook)
    except ValueError as error:
        return f"refused: {error}"


def set_where(column, value, **where):
    """An edit that sets a column in the rows where others have these values."""

    def edit(table):
        rows = pd.Series(True, table.index)
        for key, wanted in where.items():
            rows &= table[key] == wanted
        assert rows.any()
        table.loc[rows, column] = value
        return table

    return edit


@pytest.mark.parametrize(
    ("notebook", "file", "edit", "said"),
    [
        (
            "01_locate_evidence",
            "X_locate_agreement_live",
            set_where("tags", "no", family="Idefics3"),
            "the procedures agree wherever they can be applied",
        ),
        (
            "02_score_heads",
            "X_null_images_live",
            set_where("left_high", 0.001, task="image", null_images="pixels"),
            "the score falls below zero",
        ),
        (
            "03_sparsity_curves",
            "A_fig3_sparsity_released",
            set_where("value", 9.0, model="Gemma3-27B", task="text"),
            "the numbers are those that paper A prints",
        ),
        (
            "03_sparsity_curves",
            "X_head_spread_released",
            set_where("top", 30, model="Qwen3-VL-8B", task="text", unit="layers"),
            "the strongest heads lie in fewer layers",
        ),
        (
            "04_spearman_stability",
            "X_lengths_released",
            set_where("overlap", 0.29, model="Gemma3-12B", task="text", a=8192, b=16384),
            "overlaps are above chance: X_lengths_released",
        ),
        (
            "05_ablations",
            "X_selected_against_random_live",
            set_where("p_holm", 0.2, task="image", fraction=0.1),
            "selected heads cost more than all others",
        ),
        (
            "05_ablations",
            "X_fraction_live",
            set_where("accuracy", 0.06, ablation="0.05"),
            "above the papers' 5%",
        ),
        (
            "05_ablations",
            "X_cause_agreement_live",
            set_where("auroc", 0.1, task="text", a="score"),
            "the score finds the heads that matter to text better",
        ),
        (
            "06_retrieval",
            "X_retrieval_paired_live",
            set_where("p_holm", 0.01, level="page", against="all heads", documents="similar"),
            "more in some kinds of documents, not shown in others",
        ),
        (
            "07_latency",
            "B_fig7_latency_live",
            set_where("speed_up", 0.9, scope="attention", variant="streaming", tokens=8192),
            "window heads make the prefill faster",
        ),
    ],
)
def test_a_comparison_that_no_longer_holds_is_refused(notebook, file, edit, said, copied):
    change(copied / f"{file}.csv", edit)
    with pytest.raises(ValueError, match=f"no longer say this, so change the sentence: .*{said}"):
        make_claims.text(notebook)


def test_a_number_that_changes_is_written_anew(copied):
    edit = set_where("value", 61.4, pair="8K&128K", task="image")
    change(copied / "A_fig5_overlap_released.csv", edit)
    assert "keep 61% of their heads (image task)" in make_claims.text("04_spearman_stability")


def test_data_without_a_row_or_with_two_are_named():
    with pytest.raises(ValueError, match=r"A_fig3_sparsity_released\.csv has no row where .*music"):
        figure_data.row("A_fig3_sparsity_released", task="music")
    with pytest.raises(ValueError, match="has no column 'tasks', only"):
        figure_data.rows("A_fig3_sparsity_released", tasks="text")
    with pytest.raises(ValueError, match=r"has 6 rows where .*text.*, expected one"):
        figure_data.row("A_fig3_sparsity_released", task="text")


def test_only_the_claim_of_a_notebook_changes():
    path = make_claims.notebook_path("04_spearman_stability")
    content = path.read_text(encoding="utf-8")
    changed = make_claims.with_claim(content, "Nothing.")
    assert make_claims.with_claim(changed, make_claims.text(path.stem)) == content
    lines, others = content.split("\n"), changed.split("\n")
    (new,) = (after for before, after in zip(lines, others, strict=True) if before != after)
    assert new == '    "**Claim.** Nothing.\\n",'
    notebook = json.loads(content)
    notebook["cells"][0]["source"] *= 2
    with pytest.raises(ValueError, match="the first cell has 2 lines"):
        make_claims.with_claim(json.dumps(notebook), "Nothing.")


def test_numbers_are_written_as_the_prose_needs_them():
    assert [figure_data.count(n) for n in (0, 7.0, 10, 11, 2085)] == [
        "none",
        "seven",
        "ten",
        "11",
        "2,085",
    ]
    assert figure_data.span([0.1, 0.044], ".1%") == "4.4 to 10.0%"
    assert figure_data.span([0.05, 0.051]) == "5%"
    assert figure_data.listed(["a"]) == "a"
    assert figure_data.listed(["a", "b", "c"]) == "a, b and c"


def test_numbers_of_every_claim_come_out_without_pandas():
    claims = {name[:2]: make_claims.text(name) for name in CLAIMED}
    tokens = [int(row["tokens"]) for row in chosen("X_tokens_by_family_live", image="page")]
    assert f"takes {min(tokens)} to {max(tokens):,} visual tokens" in claims["01"]

    scores = chosen("B_fig9_heatmaps_live", task="image", score_kind="RAM mass")
    assert f"{max(number(row, 'score') for row in scores):.2f} (image)" in claims["02"]

    shares = [number(row, "value") for row in rows("A_fig3_sparsity_released")]
    assert f"{min(shares):.1f} to {max(shares):.1f}% of the attention heads" in claims["03"]

    (kept,) = chosen("A_fig5_overlap_released", pair="8K&128K", task="image")
    assert f"keep {number(kept, 'value'):.0f}% of their heads (image task)" in claims["04"]

    fixed = {"fraction": figure_data.fixed_share(), "task": "text"}
    (left,) = chosen("B_fig6_ablation_live", ablation="selected", **fixed)
    assert f" to {100 * number(left, 'score'):.0f}% (text; chance 6%)" in claims["05"]
    held_out = {
        (row["task"], row["ablation"]): number(row, "accuracy") for row in rows("X_fraction_live")
    }
    guessed = {"text": 1 / 16, "rendered_text": 1 / 16, "image": 1 / 4, "identical_image": 1 / 2}
    lost = [
        (held_out[task, "full model"] - held_out[task, "0.05"])
        / (held_out[task, "full model"] - chance)
        for task, chance in guessed.items()
    ]
    way = f"ablating 5% takes the accuracy {100 * sum(lost) / 4:.0f}% of the way to chance"
    assert way in claims["05"]

    table = {"method": "selected heads", "level": "page", "kind": "icon"}
    found = sorted(number(row, "R@1") for row in chosen("A_table2_generated_live", **table))
    assert f"for {100 * found[0]:.0f} to {found[-1]:.0%} of those about an icon" in claims["06"]

    streamed = {"ablation": "retrieval score", "share": 0.1, "task": "text"}
    (right,) = chosen("X_streaming_accuracy_live", **streamed)
    answered = number(right, "n") * number(right, "score")
    assert f"answers {answered:.0f} (text)" in claims["07"]
