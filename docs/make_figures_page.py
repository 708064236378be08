"""Write `docs/figures.md` from the manifest, the data of the figures, and the notebooks.

python docs/make_figures_page.py
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nbformat
import pages
import pandas as pd

from cluster import real_model as plan
from mmheads import figures, paths

PAGE = Path(__file__).with_name("figures.md")
SOURCES = ("paper", "released", "live", "real")
TASKS = {"text": "text", "image": "image", "rendered_text": "rendered text"} | {
    "identical_image": "identical image"
}
FIGURE = re.compile(r"`([ABX]_\w+)`")
SIZES = ("n", "prompts", "haystacks", "examples", "runs")
"""Columns that say how many observations a row of data rests on, the first that is there."""
LONGEST_TABLE = 14
"""Rows of the longest table that is shown unfolded."""


@dataclass(frozen=True)
class Cell:
    """Numbers of one file of data, as they are shown in one cell of the overview.

    Attributes:
        file: Name of a CSV file in `figures/`; with "papers/" or "results/" before it, in that
            folder of `data/`.
        column: The column with the numbers.
        where: Value of a column that chooses the rows, by the name of the column.
        percent: Whether the numbers are fractions and shown as percent.
    """

    file: str
    column: str
    where: Mapping[str, object] = field(default_factory=dict)
    percent: bool = False

    def text(self) -> str:
        """Returns the number with its interval and n, or the range of several numbers."""
        table = data(self.file)
        for name, value in self.where.items():
            if name not in table:
                raise ValueError(f"{self.file}.csv has no column {name!r}, only {[*table]}")
            table = table[table[name].astype(str) == str(value)]
        if self.column not in table or table.empty:
            raise ValueError(
                f"{self.file}.csv has no {self.column!r} where {dict(self.where)}; change the "
                "overview in docs/make_figures_page.py along with the notebook"
            )
        scale = 100 if self.percent else 1
        shown = table.loc[table[self.column].notna()]
        numbers = [number(scale * value) for value in shown[self.column]]
        if len(numbers) > 1:
            ordered = sorted(set(numbers), key=float)
            ends = dict.fromkeys((ordered[0], ordered[-1]))
            return f"{' to '.join(ends)} ({len(numbers)} values)"
        (row,) = shown.to_dict("records")
        text = numbers[0]
        if self.column == "paper":
            return text
        if {"low", "high"} <= row.keys() and pd.notna(row["low"]):
            text += f" [{number(scale * row['low'])}, {number(scale * row['high'])}]"
        sizes = [name for name in SIZES if name in row]
        return text + (f", {sizes[0]} = {row[sizes[0]]:g}" if sizes else "")


@dataclass(frozen=True)
class Entry:
    """One row of the overview: a figure or table of a paper, and one quantity of it.

    Attributes:
        figure: Its name in its paper, "A, Fig. 3".
        shows: What it shows, or the quantity in this row.
        files: Names of our figures and tables of it, without their source.
        cells: The numbers, by source.
        note: What else a reader should know.
    """

    figure: str
    shows: str
    files: tuple[str, ...] = ()
    cells: Mapping[str, Cell] = field(default_factory=dict)
    note: str = ""


def overview() -> Iterator[Entry]:
    """Yields the rows of the overview, in the order of the papers' figures."""
    longest = data("A_fig5_overlap_live").sort_values("length")["pair"].iloc[-1]
    for task, name in TASKS.items():
        chosen = {"task": task, "fraction": 0.05, "ablation": "selected"}
        pretrained = {"real": real("right answers", "top 5%")} if task == "text" else {}
        yield Entry(
            "A, Fig. 1",
            f"accuracy (%) without the 5% of heads of its own task, {name}",
            ("A_fig1_ablation", "B_fig6_ablation"),
            {"live": Cell("B_fig6_ablation_live", "score", chosen, percent=True), **pretrained},
        )
    yield Entry("A, Fig. 2", "how heads are detected, from one example", ("A_fig2_detection",))
    for task, name in TASKS.items():
        released = "A_fig3_sparsity_released"
        half = real("share of heads with half of the score", "all")
        yield Entry(
            "A, Fig. 3",
            f"share of heads (%) that holds half of the score, {name}",
            ("A_fig3_sparsity",),
            {
                "paper": Cell(released, "paper", {"task": task}),
                "released": Cell(released, "value", {"task": task}),
                "live": Cell("A_fig3_sparsity_live", "value", {"task": task, "length": "all"}),
                **({"real": half} if task == "text" else {}),
            },
        )
    for figure, key, kept in (
        (
            "A, Fig. 4",
            "preserved_qwen3_vl_8b",
            "share of Qwen3-VL-8B's heads that Qwen3-8B has too",
        ),
        (
            "A, Fig. 13",
            "preserved_gemma3_12b_it",
            "share of Gemma 3 12B's heads that its pretrained version has too",
        ),
    ):
        paper = {"paper": Cell("papers/A_statements", "paper", {"key": key})}
        yield Entry(figure, kept, ("A_fig4_preserved",), paper)
    for task, name in TASKS.items():
        kept = Cell("A_fig5_overlap_real", "value", {"pair": "256&2048"}, True)
        released = "A_fig5_overlap_released"
        yield Entry(
            "A, Fig. 5",
            f"heads (%) of the shortest context kept in the longest, {name}",
            ("A_fig5_overlap",),
            {
                "paper": Cell(released, "paper", {"task": task, "pair": "8K&128K"}),
                "released": Cell(released, "value", {"task": task, "pair": "8K&128K"}),
                "live": Cell("A_fig5_overlap_live", "value", {"task": task, "pair": longest}, True),
                **({"real": kept} if task == "text" else {}),
            },
        )
    for which in ("8K-only", "128K-only"):
        released = "A_fig6_layers_released"
        yield Entry(
            "A, Fig. 6",
            f"mean layer of the {which} image heads, Qwen3-VL-32B",
            ("A_fig6_plane", "A_fig6_layers"),
            {
                "paper": Cell(released, "paper", {"set": which}),
                "released": Cell(released, "value", {"set": which}),
            },
        )
    transfer = ("A_masking", "A_fig7_transfer")
    yield Entry("A, Fig. 7", "heads of one length ablated at another", transfer)
    chosen = (("none", "full model", "full model"), ("retrieval", "union of four tasks", "top 5%"))
    for paper, ablation, ours in chosen:
        key = {"key": f"masking_mmlongbench_doc_{paper}"}
        yield Entry(
            "A, Fig. 8",
            f"score (%) on documents, {ablation}" + (" ablated" if paper != "none" else ""),
            ("A_masking", "A_fig8_documents", "A_fig8"),
            {
                "paper": Cell("papers/A_statements", "paper", key),
                "live": Cell("A_fig8_documents_live", "score", {"ablation": ablation}, True),
                "real": real("score on real questions", ours),
            },
        )
    unable = "not run: tiny models do not reason"
    yield Entry("A, Fig. 9", "reasoning without the heads", ("A_masking",), note=unable)
    for pair, name in (("text&image", "image"), ("text&rendered_text", "rendered-text")):
        released = "A_fig10_summary_released"
        mean = {"pair": pair, "statistic": "mean"}
        yield Entry(
            "A, Fig. 10",
            f"overlap of the text heads with the {name} heads, mean",
            ("A_fig10_modalities", "A_fig10_summary"),
            {
                "paper": Cell(released, "paper", mean),
                "released": Cell(released, "value", mean),
                "live": Cell("A_fig10_modalities_live", "value", {"pair": pair}),
            },
        )
    key = {"key": "fig11_text_overlap_at_share_0.4"}
    yield Entry(
        "A, Fig. 11",
        "overlap of the text heads as the share of images grows to 0.4",
        ("A_fig11_image_share",),
        {
            "paper": Cell(
                "papers/A_statements", "paper", {"key": "fig11_text_overlap_at_share_0.4"}
            ),
            "live": Cell("A_fig11_image_share_live", "overlap", {"image_share": 0.4}),
        },
    )
    for task in ("text", "image"):
        chosen = {"task": task, "ablation": "zero, prefill and decoding"}
        yield Entry(
            "A, Fig. 12",
            f"accuracy (%), heads ablated in prefill and decoding, {task}",
            ("A_fig12_when",),
            {
                "paper": Cell("A_fig12_when_live", "paper", chosen),
                "live": Cell("A_fig12_when_live", "score", chosen, True),
            },
        )
    chosen = {"task": "text", "ablation": "zero, answer"}
    written = plan.when_name(plan.top_name(plan.MAIN), "decode")
    yield Entry(
        "A, Fig. 12",
        "accuracy (%), heads ablated in decoding only, text",
        ("A_fig12_when",),
        {
            "paper": Cell("A_fig12_when_live", "paper", chosen),
            "live": Cell("A_fig12_when_live", "score", chosen, True),
            "real": Cell("A_fig12_when_real", "value", {"about": written}, True),
        },
    )
    tables = ("A_table2_mmdocir", "A_table3_domains")
    tables = (*tables, "A_table2_generated", "A_table2_real", "A_table2_heads")
    shares = {"selected": "strongest 5% of heads", "all": "strongest 100% of heads"}
    for which, pretrained in shares.items():
        name = f"Qwen3-VL-8B {which} heads"
        chosen = {"level": "page", "method": name, "k": 1, "mean": "micro"}
        ours = {"level": "page", "method": name.removeprefix("Qwen3-VL-8B ")}
        ours |= {"documents": "random"}
        yield Entry(
            "A, Tables 1 to 3",
            f"Recall@1 (%) of pages, {name}",
            tables,
            {
                "paper": Cell("A_table2_mmdocir_paper", "paper", chosen),
                "live": Cell("A_table2_generated_live", "R@1", ours, True),
                "real": Cell("A_table2_heads_real", "R@1", {"method": pretrained}, True),
            },
        )
    for task, name in TASKS.items():
        yield Entry(
            "A, Table 4",
            f"mean overlap of three disjoint subsets, {name}",
            ("A_table4_subsets",),
            {"live": Cell("A_table4_subsets_live", "mean_overlap", {"task": task})},
        )
    yield Entry("B, Figs. 1, 2, 8", "attention over images and frames", ("B_fig1_overlay",))
    yield Entry("B, Fig. 3", "from a question to a list of heads", ("B_fig3_probing",))
    for model in ("Qwen3-VL-8B", "Qwen3-VL-32B"):
        placed = Cell("B_fig4_scale_released", "value", {"model": model, "task": "image"})
        yield Entry(
            "B, Fig. 4",
            f"mean relative layer of the image heads, {model}",
            ("B_fig4_scale",),
            {"released": placed},
        )
    yield Entry("B, Fig. 5", "stability between tasks", ("B_fig5_tasks",))
    yield Entry("B, Fig. 6", "ablation by rank of the heads", ("B_fig6_ablation",))
    chosen = {"scope": "attention", "variant": "streaming"}
    yield Entry(
        "B, Fig. 7",
        "speed-up of the prefill's attention by window heads, 1K to 16K tokens",
        ("B_fig7_latency",),
        {"live": Cell("B_fig7_latency_live", "speed_up", chosen)},
        note="the paper reports 1.8 to 2.3 on a GPU",
    )
    yield Entry("B, Fig. 9", "scores of all heads, layer by head", ("B_fig9_heatmaps",))


# --- what the repository says


@cache
def data(file: str) -> pd.DataFrame:
    """Returns the data of a figure, or numbers of `data/`."""
    folder = paths.DATA if "/" in file else paths.FIGURES
    return pd.read_csv(folder / f"{file}.csv", encoding="utf-8")


def real(quantity: str, about: str) -> Cell:
    """A share of the pretrained text model."""
    return Cell("results/real_model", "value", {"quantity": quantity, "about": about}, percent=True)


def number(value: float) -> str:
    """Returns a number with three significant digits, and no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


@cache
def committed() -> dict[str, dict[str, object]]:
    """Returns the manifest's entry of each figure and table, by name, with its `suffixes`."""
    result: dict[str, dict[str, object]] = {}
    for entry in figures.manifest():
        name, suffix = entry["file"].split(".")
        result.setdefault(name, {**entry, "suffixes": set()})["suffixes"].add(suffix)  # type: ignore[attr-defined]
    return result


@cache
def first_cells() -> dict[str, str]:
    """Returns the text of the first cell of each notebook, by name."""
    return {
        path.stem: nbformat.read(path, as_version=4).cells[0].source  # type: ignore[no-untyped-call]
        for path in sorted(paths.NOTEBOOKS.glob("*.ipynb"))
    }


@cache
def descriptions() -> dict[str, tuple[str, str]]:
    """Returns what each figure shows, as its notebook says, and the notebook."""
    result: dict[str, tuple[str, str]] = {}
    for notebook, text in first_cells().items():
        for made, shows in re.findall(r"^\| *(`.+?) *\| *(.+?) *\|$", text, re.M):
            result |= dict.fromkeys(FIGURE.findall(made), (shows, notebook))
    return result


def link(name: str) -> str:
    """Returns a link to the section of a figure, which is called by its topic and source."""
    _, *topic, source = name.split("_")
    return f"[{' '.join(topic)}, {source}](#{name.lower()})"


def notebook_link(notebook: str) -> str:
    """Returns a link to a notebook."""
    return f"[{notebook[:2]}](../notebooks/{notebook}.ipynb)"


def models(name: str) -> str:
    """Returns the models of a figure: as its data say, else those of its notebook."""
    table = data(name)
    if "model" in table:
        return "Models: " + ", ".join(map(str, table["model"].unique()))
    if "family" in table:
        return "Processors of " + ", ".join(map(str, table["family"].unique()))
    if name.endswith("_paper"):
        return "As printed in the paper"
    released = name.endswith("_released")
    every: Mapping[str, str] = committed()[name]["models"]  # type: ignore[assignment]
    shown = [model for model, revision in every.items() if ("@" in revision) == released]
    return "Models of the notebook: " + ", ".join(model.rsplit("/", 1)[-1] for model in shown)


def certainty(name: str) -> str:
    """Returns what the data say about how sure the numbers are: n and intervals."""
    table = data(name)
    sizes = [column for column in SIZES if column in table and table[column].notna().any()]
    said = []
    for column in sizes[:1]:
        least, most = table[column].min(), table[column].max()
        said.append(f"{column} = {least:g}" + (f" to {most:g}" if most > least else ""))
    if {"low", "high"} <= set(table):
        said.append("with intervals")
    facts = [", ".join(said)] if said else []
    if {"value", "paper"} <= set(table):
        difference = (table["value"] - table["paper"]).abs().max()
        facts.append(
            f"Largest difference from the paper's {len(table)} numbers: {number(difference)}"
        )
    return ". ".join(facts)


# --- the page


def overview_table() -> Iterator[str]:
    """Yields the lines of the table of the papers' figures."""
    yield "| figure | quantity | paper | released | live | real model | see | notebook |"
    yield "|---|---|---|---|---|---|---|---|"
    for entry in overview():
        names = [f"{file}_{source}" for file in entry.files for source in SOURCES]
        made = [name for name in names if name in committed()]
        shown = [entry.cells[s].text() if s in entry.cells else "-" for s in SOURCES]
        notebooks = dict.fromkeys(str(committed()[name]["notebook"]) for name in made)
        links = "; ".join([*map(link, made), *filter(None, [entry.note])])
        where = ", ".join(map(notebook_link, notebooks)) or "-"
        yield f"| {' | '.join((entry.figure, entry.shows, *shown, links, where))} |"


def section(name: str) -> Iterator[str]:
    """Yields the lines about one figure or table."""
    entry = committed()[name]
    shows, _ = descriptions().get(name, ("", ""))
    suffixes: set[str] = entry["suffixes"]  # type: ignore[assignment]
    shown = {"png", "pdf", "csv", "tex"} & suffixes  # what is in the .md file is on this page
    files = [f"[{suffix.upper()}](../figures/{name}.{suffix})" for suffix in sorted(shown)]
    facts = [shows[:1].upper() + shows[1:], models(name), certainty(name)]
    facts.append(f"Notebook {notebook_link(str(entry['notebook']))}; files: {', '.join(files)}")
    yield f"### {name}"
    yield ""
    yield ". ".join(fact for fact in facts if fact) + "."
    yield ""
    if "png" in suffixes:
        yield f"![{name}: {shows.replace('`', '')}](../figures/{name}.png)"
    else:
        table = (paths.FIGURES / f"{name}.md").read_text(encoding="utf-8").strip()
        rows = table.count("\n") - 1
        folded = rows > LONGEST_TABLE
        yield from (f"<details><summary>{rows} rows</summary>", "") if folded else ()
        yield table
        yield from ("", "</details>") if folded else ()
    yield ""


def notebook_sections() -> Iterator[str]:
    """Yields the lines of all figures, notebook by notebook, each after the notebook's claim."""
    for notebook, text in first_cells().items():
        title = text.split("\n")[0].removeprefix("# ")
        claim = re.search(r"\*\*Claim\.\*\* (.+)", text)
        time = re.search(r"\*\*Run time\*\*: (.+?\.)(?= |$)", text, re.M)
        yield from (f"## {title}", "", f"[Open the notebook](../notebooks/{notebook}.ipynb).")
        yield ""
        yield from (f"**What it finds.** {claim[1]}", "") if claim else ()
        yield from (f"**Run time**: {time[1]}", "") if time else ()
        for name, entry in committed().items():
            if entry["notebook"] == notebook:
                yield from section(name)


def missing_sections() -> Iterator[str]:
    """Yields the lines about the figures that need published data sets."""
    absent = [name for name in descriptions() if name not in committed()]
    yield "## Figures that need published data sets"
    yield ""
    yield (
        "These are made by the same notebooks when the parameter `data` names a folder of "
        "[published data sets](paper_scale.md), or `benchmark_tasks` names tasks of "
        "[lmms-eval](paper_scale.md#benchmarks). They were never made on the papers' models."
    )
    yield from ("", "| figure | shows | notebook |", "|---|---|---|")
    for name in absent:
        shows, notebook = descriptions()[name]
        yield f"| `{name}` | {shows} | {notebook_link(notebook)} |"


INTRODUCTION = """# Figures

<!-- Generated by docs/make_figures_page.py. Do not edit: run it again. -->

Every figure and table of this project, with the notebook that makes it, the models that it shows,
and how many observations it rests on. The name of a file says the rest:
`<paper>_<figure>_<topic>_<source>`, where the paper is A (arXiv 2605.27243), B (arXiv 2606.05843),
or X for figures that are only ours. The sources:

- `released`: computed from the scores that paper A's authors released for six large models;
- `live`: computed here, from the tiny models that we train, unless the row of the figure says
  otherwise; these numbers show how a method works, and say nothing about large models;
- `real`: computed here from a [pretrained text model](real_model.md);
- `paper`: numbers that a paper prints.

Names that begin with `B_` say which kind of figure it is. Paper B ranks heads by RAM; where one of
these figures ranks them by paper A's calibrated score, its description says so.

Terms are defined in the [glossary](glossary.md). What was not run is in
[limitations](limitations.md).

## The figures of both papers

One row per quantity. Numbers are read from the committed data: an interval is in square brackets,
a range over several values has their count in round ones. "-" means that there is no such number.
Compare columns with care: the tiny models have far fewer heads than the papers' models, and read
far shorter contexts.

"""


def page() -> str:
    """Returns the text of the page."""
    parts = (INTRODUCTION.splitlines(), overview_table(), [""], notebook_sections())
    lines = [line for part in (*parts, missing_sections()) for line in part]
    return "\n".join(lines).rstrip() + "\n"


def write() -> None:
    """Write the page, unless it is there already."""
    pages.write(PAGE, page())


if __name__ == "__main__":
    write()
