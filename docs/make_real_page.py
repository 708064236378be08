"""Write `docs/real_model.md` from the numbers of the pretrained text model.

python docs/make_real_page.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pandas as pd
from figure_data import data, with_interval

from cluster import real_model, real_prose, real_single, real_streaming
from mmheads import paths

PAGE = Path(__file__).with_name("real_model.md")
NUMBERS = paths.DATA / "results" / "real_model.csv"
RANKED = paths.DATA / "results" / "real_ranking.parquet"
BLOCKS = paths.DATA / "results" / "real_blocks.parquet"
TIMES = paths.DATA / "results" / "real_times.csv"
HEADS_SHOWN = 5
SINGLE_SHOWN = 8
WHOLE = "full model"
MEASURED = ("scores", "answers", "effects")

Row = dict[str, Any]


def rows(quantity: str) -> list[Row]:
    """Returns the rows of a quantity."""
    table = pd.read_csv(NUMBERS, encoding="utf-8", dtype={"about": str})
    found: list[Row] = table[table["quantity"] == quantity].to_dict("records")
    return found


def only(quantity: str, about: str = "") -> Row:
    """Returns the one row of a quantity."""
    (row,) = (row for row in rows(quantity) if not about or row["about"] == about)
    return row


def percent(row: Row, digits: int = 0) -> str:
    """A share with its interval: "96% [80%, 99%]"."""
    value, low, high = (f"{row[name]:.{digits}%}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def p(value: float) -> str:
    """A p-value as it is printed."""
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"


def heads_section() -> Iterator[str]:
    """Yields the lines about the heads."""
    yield from (
        "| length (tokens) | heads (%) with half of the score | haystacks |",
        "|---|---|---|",
    )
    for row in rows("share of heads with half of the score"):
        yield f"| {row['about']} | {percent(row, 1)} | {row['n']:.0f} |"
    yield ""
    strongest = [f"{row['about']} ({with_interval(row)})" for row in rows("score")[:HEADS_SHOWN]]
    count = len(rows("score"))
    yield (
        f"The {count} heads of the list are the strongest 5% of 336. The first {HEADS_SHOWN}, with "
        f"their calibrated scores: {', '.join(strongest)}."
    )
    among = only("heads of the list among the strongest")
    yield (
        f"On all {among['about']}, {among['value']:.0f} of the {among['n']:.0f} are among the "
        "strongest 5%."
    )
    halves, lengths = only("heads shared by the halves"), rows("heads shared by two lengths")
    yield (
        f"Two halves of the haystacks share {halves['value']:.0f} of their {halves['n']:.0f} top "
        f"heads (by chance {halves['chance']:.1f}; p = {p(halves['p'])}); "
        + " and ".join(
            f"the lengths {row['about']} share {row['value']:.0f} of {row['n']:.0f}"
            for row in lengths
        )
        + "."
    )
    for row in rows("heads found again"):
        yield (
            f"A second search, with other needles in other haystacks ({row['about'].split(', ')[1]}"
            f" tokens, seed 1), finds {row['value']:.0f} of the {row['n']:.0f} heads of the list "
            f"(by chance {row['chance']:.1f}; p = {p(row['p'])})."
        )


def answers_section() -> Iterator[str]:
    """Yields the lines about answers without the heads."""
    yield "| heads ablated | right answers | n | exact p against the whole model |"
    yield "|---|---|---|---|"
    for row in rows("right answers"):
        name = "none" if row["about"] == WHOLE else row["about"]
        tested = p(row["p"]) if row["p"] == row["p"] else "-"
        yield f"| {name} | {percent(row)} | {row['n']:.0f} | {tested} |"
    for row in (*rows("right answers, other ranks"), *rows("right answers, some tokens")):
        yield f"| {row['about']} | {percent(row)} | {row['n']:.0f} | {p(row['p'])} |"
    for lost, beside, sets in zip(
        rows("points lost to the selected heads"),
        rows("random sets that do as much harm on the same prompts"),
        rows("random sets that do as much harm"),
        strict=True,
    ):
        yield ""
        yield (
            f"On {lost['n']:.0f} prompts, the strongest {fraction_of(lost)} of the heads cost "
            f"{points(lost)} points more than {sets['n']:.0f} random sets of as many (exact p = "
            f"{p(lost['p'])}). "
            f"On the same prompts, {beside['value']:.0f} of the {sets['n']:.0f} sets did as much "
            f"harm as the strongest heads; by the rank test, {sets['value']:.0f} did (p = "
            f"{p(sets['p'])})."
        )


def single_section() -> Iterator[str]:
    """Yields the lines about heads that were ablated one by one."""
    found = rows("nats lost without one head")
    places = {row["about"]: place for place, row in enumerate(found, 1)}  # by score
    shown = sorted(found, key=lambda row: -abs(row["value"]))[:SINGLE_SHOWN]
    yield "| head | place by score | nats lost | p (Holm) |"
    yield "|---|---|---|---|"
    for row in shown:
        low, high = (f"{row[name]:+.2f}" for name in ("low", "high"))
        cells = [row["about"], str(places[row["about"]]), f"{row['value']:+.2f} [{low}, {high}]"]
        yield f"| {' | '.join([*cells, p(row['p'])])} |"
    yield ""
    foretold = {row["about"]: row for row in rows("rank correlation with the nats lost")}
    told = [
        f"{name} {with_interval(row)}"
        for name, row in (
            ("the score", foretold["score"]),
            ("the gate gradient", foretold["gradient"]),
        )
    ]
    shown_lost = sum(row["p"] < 0.05 and row["value"] > 0 for row in found)
    yield (
        f"Of the {len(found)} heads, {shown_lost} are shown to cost anything (corrected p below "
        "0.05). Spearman's correlation of the loss over these heads is, with "
        f"{' and with '.join(told)} (intervals over prompts)."
    )


def prose_section() -> Iterator[str]:
    """Yields the lines about the loss on prose."""
    whole = only("loss on prose")
    yield "| heads ablated | loss added, nats per token | p |"
    yield "|---|---|---|"
    for row in rows("loss on prose, added"):
        low, high = (f"{row[name]:+.2f}" for name in ("low", "high"))
        yield f"| {row['about']} | {row['value']:+.2f} [{low}, {high}] | {p(row['p'])} |"
    yield ""
    yield (
        f"The whole model's loss is {whole['value']:.2f} [{whole['low']:.2f}, {whole['high']:.2f}] "
        f"nats per token ({whole['n']:.0f} passages)."
    )


def dense_section() -> Iterator[str]:
    """Yields the lines about answers with few dense heads."""
    yield "| dense heads | needle | right answers | n | p against the whole model |"
    yield "|---|---|---|---|---|"
    for row in rows("right answers, dense heads"):
        share, *heads, where = row["about"].split(", ")
        name = {WHOLE: "all", "retrieval score": f"top {share}"}.get(
            heads[0], f"random {share}, same layers"
        )
        if name != "all" or share == "5%":
            tested = p(row["p"]) if row["p"] == row["p"] else "-"
            where = where.removeprefix("needle ")
            yield f"| {name} | {where} | {percent(row)} | {row['n']:.0f} | {tested} |"
    yield ""
    gained = [
        f"{100 * row['value']:.0f} points [{100 * row['low']:.0f}, {100 * row['high']:.0f}] at "
        f"{row['about']} (p = {p(row['p'])}, n = {row['n']:.0f})"
        for row in rows("points gained by dense heads")
    ]
    yield (
        "With the needle outside the window, the strongest heads keep more answers than random "
        f"ones by {' and '.join(gained)}."
    )


def times_section() -> Iterator[str]:
    """Yields the lines about the times of a prefill."""
    table = pd.read_csv(TIMES, encoding="utf-8")
    yield "| tokens | dense heads | CPU seconds | speed-up | allowed by the operations |"
    yield "|---|---|---|---|---|"
    for _, row in table.iterrows():
        yield (
            f"| {row['tokens']:,} | {row['dense_heads']:.0%} | {row['seconds']:.1f} "
            f"[{row['low']:.1f}, {row['high']:.1f}] | {row['speed_up']:.2f} | {row['limit']:.2f} |"
        )
    yield ""
    yield f"{table['runs'].iloc[0]} runs of each in turn; {table['machine'].iloc[0]}, float32."


def questions_section() -> Iterator[str]:
    """Yields the lines about questions on real documents."""
    yield "| heads ablated | mean score (%) | questions | points lost | p |"
    yield "|---|---|---|---|---|"
    losses = {row["about"]: row for row in rows("lost on real questions")}
    for row in rows("score on real questions"):
        lost, name = losses.get(row["about"]), row["about"]
        cells = ["none" if name == WHOLE else name, percent(row), f"{row['n']:.0f}"]
        cells += [points(lost), p(lost["p"])] if lost else ["-", "-"]
        yield f"| {' | '.join(cells)} |"
    row = only("lost to the selected heads on real questions")
    yield ""
    yield (
        f"On the {row['n']:.0f} questions with random sets, the strongest heads cost {points(row)} "
        f"points more than random ones (p = {p(row['p'])})."
    )


def points(row: Row) -> str:
    """A difference of shares with its interval, in points: "+12 [+3, +21]"."""
    value, low, high = (f"{100 * row[name]:+.0f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def ranking_section() -> Iterator[str]:
    """Yields the lines about rankings of real documents."""
    yield "| method | Recall@1 (%) | Recall@3 | Recall@5 |"
    yield "|---|---|---|---|"
    yield from recall_rows("A_table2_heads_real")
    yield ""
    yield "| heads of the list, beside | points of Recall@1 | p (Holm) | least that is shown |"
    yield "|---|---|---|---|"
    yield from paired_rows("X_ranking_paired_real")


def recall_rows(name: str, *others: str) -> Iterator[str]:
    """Yields the rows of a table of recalls, with other columns in percent."""
    for _, row in data(name).iterrows():
        low, high = 100 * row["low"], 100 * row["high"]
        cells = [row["method"], f"{100 * row['R@1']:.1f} [{low:.1f}, {high:.1f}]"]
        cells += [f"{100 * row[column]:.1f}" for column in ("R@3", "R@5", *others)]
        yield f"| {' | '.join(cells)} |"


def paired_rows(name: str) -> Iterator[str]:
    """Yields the rows of a table of paired differences."""
    for _, row in data(name).iterrows():
        value, low, high = (100 * row[column] for column in ("value", "low", "high"))
        yield (
            f"| {row['against']} | {value:+.1f} [{low:+.1f}, {high:+.1f}] | "
            f"{p(row['p_holm'])} | {100 * row['least']:.1f} |"
        )


def blocks_section() -> Iterator[str]:
    """Yields the lines about rankings of text blocks."""
    yield "| method | recall at 1 (%) | at 3 | at 5 | area of the first (% of the page) |"
    yield "|---|---|---|---|---|"
    yield from recall_rows("X_blocks_real", "area")
    yield ""
    yield "| heads of the list, beside | points of recall at 1 | p (Holm) | least that is shown |"
    yield "|---|---|---|---|"
    yield from paired_rows("X_blocks_paired_real")


def whole_section() -> Iterator[str]:
    """Yields the lines about whole pages."""
    yield "| method | Recall@1 (%) | Recall@3 | Recall@5 |"
    yield "|---|---|---|---|"
    yield from recall_rows("X_whole_pages_real")


def about_whole() -> Row:
    """Returns how many documents were read whole, and how many questions they have."""
    table = pd.read_parquet(RANKED).query("method == 'heads, whole pages'")
    return {"whole_documents": table["document"].nunique(), "whole_questions": len(table)}


def cost_of_ranking() -> Row:
    """Returns the seconds of an index and of a question."""
    return {
        f"{name}_{'page' if row['about'] == 'per page' else 'seconds'}": row["value"]
        for name in ("index", "question")
        for row in rows(f"CPU seconds of a ranking, {name}")
    }


def about_blocks() -> Row:
    """Returns how many questions, pages and documents the ranking of blocks has."""
    table = pd.read_parquet(BLOCKS).query("method == 'BM25'")
    return {
        "block_questions": len(table),
        "block_pages": len(table.drop_duplicates(["document", "page"])),
        "block_documents": table["document"].nunique(),
        "blocks_of_a_page": f"{table.drop_duplicates(['document', 'page'])['blocks'].median():.0f}",
    }


def about_documents() -> Row:
    """Returns how many documents and questions were ranked, and the sizes of the documents."""
    table = pd.read_parquet(RANKED).query("method == 'BM25'")
    sizes = table.drop_duplicates("document")["pages"]
    return {
        "documents": len(sizes),
        "questions": len(table),
        "least_pages": sizes.min(),
        "most_pages": sizes.max(),
    }


def fraction_of(row: Row) -> str:
    """Returns the share of heads of random sets: the "5%" of their name."""
    return str(row["about"]).split()[1].rstrip(",")


TEXT = """# A pretrained text model

<!-- Generated by docs/make_real_page.py. Do not edit: run it again. -->

The numbers of this page come from one pretrained language model, which was run here on a CPU. It is
a GGUF file that identifies itself as Qwen2.5-Coder-0.5B-Instruct (Q4_K_M, Apache-2.0; 24 layers of
14 heads in 2 KV groups). Its publisher's repository is
[Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF](https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF).
The file was assembled from published packages and could not be compared with the publisher's; its
SHA-256 is the revision in the [head list](../data/heads/{model}.json). The weights are
dequantised, and everything is computed in float32.

The needles are those of `mmheads detect`: sentences about invented things ("The storage limit of
the maple hill school is 48213."), hidden at six depths in sentences of the shipped corpus, and each
asked for by a question. The model reads only text, so there is only the text task. This is one
small model with one kind of needle, and says little about others.

## Which heads look at the needle

Calibrated retrieval scores of {haystacks} haystacks at each length, each with the needle at six
depths. Intervals are 95% bootstrap intervals over the haystacks. The list had been found on the
first {search_haystacks} haystacks, at up to {search_length:,} tokens. The sections below this one
use that list and the ranking that it comes from.

{heads}

## What answers lose without them

{prompts} prompts of 512 tokens, each with a needle and a haystack of its own that the detection has
not used, answered greedily with at most 24 tokens. An answer is right if it holds every word of the
right one. Heads are ablated (set to zero) in prefill and decoding, unless the table names some of
the tokens; the token before the generated ones is the last of the prompt, at which the first word
of an answer is predicted. Random sets have as many heads
in each layer as the strongest ones, and are drawn from all heads of the layer, the strongest among
them. Each was asked with six prompts, one at each depth. Their interval is a bootstrap over the
prompts, and their p is that of the exact sign test on the mean of each prompt. The rank test
compares the right answers that each set leaves on its six prompts with those that the strongest
heads leave on the six on which they leave most: were the strongest heads random, too, their rank
would be exact on any six prompts, and the least favourable one is taken. On so few prompts this is
a weak test. The comparison that was named beforehand is that of the strongest 5% with random sets;
all others are exploratory. Intervals are Wilson's, and p is that of McNemar's exact test, without a
correction for the number of rows.

{answers}

## What single heads do

Of these prompts, the whole model answers {at_once} with the value itself and not with a sentence.
On the first {single_prompts} of them, the {single} strongest heads were ablated one by one; the
loss is the mean fall of the log-odds of the answer's first token. On the other {gradients}, the
gradient of the log-odds with respect to a factor on each head's output was taken (the gate
gradient). The table has the {single_shown} heads that cost or gain most. Intervals are bootstrap
intervals over prompts; p is that of sign flips, corrected over the {single} heads, and cannot be
below 0.02.

{singles}

## What prose loses without them

A model that can no longer write loses answers, too. {passages} paragraphs of the shipped corpus,
without needles: the mean loss of the first {prose_tokens} tokens, and what each ablation adds to
it; random sets are means of {prose_sets}. Intervals are bootstrap intervals over paragraphs, and p
is that of sign flips, without a correction.

{prose}

## What few dense heads keep, and what they cost

The first {streamed} of these prompts, with only a few *dense heads* that see everything; all
others see the first 4 tokens and a window of 60, an eighth of the prompt, in prefill and decoding.
A needle at the last depth is inside the window, so that no head has to fetch it. Each prompt with
random dense heads has a set of its own. Intervals are bootstrap intervals over prompts, and p is
that of exact sign tests.

{dense}

The prefill of this model at the same setting, on random tokens. CPU time of one thread was taken,
since the machine had other work; it is not the time that a user waits on a quiet machine.

{times}

## What answers on real documents lose without the heads

{asked_questions} questions of MMDocIR, from {asked_documents} documents, asked with the beginnings
(1,500 characters of the text layer) of the gold page and of the pages before and after it. Of all
questions about one page, those were taken whose answer, of at least three characters, stands in the
text of that page; all of them were asked.
The instruction is that of MMLongBench without its offer to say 'Not answerable': asked with it, the
whole model gave this answer to the first two questions. Answers have at most {new_tokens} tokens
and are scored by MMLongBench's rule; the kind of the right answer (number, list, text), which the
rule needs, is read off its form. Heads are ablated that were found on needles. Intervals are
bootstrap intervals over documents, and p is that of sign flips of documents, without a correction
for the number of rows.

{questions_table}

## How its heads rank the pages of real documents

The heads of the list, which were found on needles, rank the pages of {documents} documents of
MMDocIR for {questions} questions: the {documents} shortest documents with a text layer, of
{least_pages} to {most_pages} pages. The model reads the first 1,500 characters of the text layer of
each page, in windows of at most 8 pages, and a page's score is the attention that it gets from the
question less that from a null question. The share of 5%, calibration and no division by length were
fixed before any document was ranked. "Chosen on other documents" takes for each document the share,
calibration and normalisation that are best on all others; every other row of heads is as it is
named. BM25, MiniLM and the heads read the same text, but for the row that says otherwise. Intervals
are bootstrap intervals over documents.

{ranking}

The differences are paired by question, with documents as the units of interval and test (sign
flips). The last column is the least difference that a study of this size would show with a
probability of 80%, by a test at 5% without a correction.

The median document takes {index_seconds:.0f} seconds of one core to index, and the median question
to an indexed document {question_seconds:.1f}; without an index, a question takes both. Over all
documents, that is {index_page:.1f} and {question_page:.2f} seconds per page.

Whole pages were read of {whole_documents} of these documents (4 pages to a window), with
{whole_questions} questions:

{whole}

## How its heads rank the text blocks of a page

Where on the right page is the answer? {block_questions} questions about {block_pages} pages of
{block_documents} documents: those about one page, of whose gold boxes text blocks can cover at
least half of the area. The candidates are the text blocks of this page (the median page has
{blocks_of_a_page}). The model reads them one after the other, without their places. Recall is the
share of the gold boxes' area that the first blocks cover. It has no penalty for large blocks, so
the area of the first one is given beside it, and the ranking that takes the largest blocks first.
The settings are those of the pages above.

{blocks}

## How it was run, and what was not

On 2 CPU cores that were shared with other work, with one thread: {minutes:.0f} minutes of CPU time
for all scores and answers, and {ranking_minutes:.0f} for the attention to pages and text blocks.
The plan was cut to fit into that time:

- {sets} random sets of 5%, each asked with six prompts, but {other_sets} of every other share;
- no random sets that leave out the selected heads;
- whole pages of {whole_documents} documents only, and no documents of more than {most_pages} pages.

The plan had about 100 questions on real documents; only {asked_questions} have their answer in the
text.

The results are shipped in `data/results`, and the numbers of this page
are [one table](../data/results/real_model.csv). To run all of it again, which continues where it
was interrupted:

```sh
export MMHEADS_REAL_LM={model}.gguf
export MMHEADS_REAL_EMBEDDER=all-MiniLM-L6-v2  # folder or name of the dense retriever
export MMHEADS_REAL_DOCS=FOLDER  # MMDocIR's annotations and pdfs/
python -m cluster.real_model
python -m cluster.real_streaming
python -m cluster.real_questions
python -m cluster.real_prose
python -m cluster.real_single
python -m cluster.real_documents
python -m cluster.real_documents --whole --pages 17
python -m cluster.real_blocks
python -m cluster.ship {model} --machine "2 CPU cores"
python -m cluster.real_results
python -m cluster.real_ranking
python docs/make_real_page.py
```

`MMHEADS_REAL_LM` names the file. Where it is set, `python -m pytest -m slow` also compares the
attention of this model with eager attention, and computes a sample of the results again.
"""


def page() -> str:
    """Returns the text of the page."""
    drawn = [row["n"] for row in rows("random sets that do as much harm")]
    return TEXT.format(
        model="qwen2.5-coder-0.5b-instruct-q4_k_m",
        heads="\n".join(heads_section()),
        answers="\n".join(answers_section()),
        prompts=f"{only('right answers', WHOLE)['n']:.0f}",
        minutes=sum(only("CPU minutes", kind)["value"] for kind in MEASURED),
        ranking_minutes=only("CPU minutes", "masses")["value"],
        sets=f"{max(drawn):.0f}",
        other_sets=f"{min(drawn):.0f}",
        prose="\n".join(prose_section()),
        passages=f"{only('loss on prose')['n']:.0f}",
        prose_tokens=real_prose.TOKENS,
        prose_sets=real_prose.RANDOM_SETS,
        streamed=real_streaming.PROMPTS,
        ranking="\n".join(ranking_section()),
        dense="\n".join(dense_section()),
        times="\n".join(times_section()),
        questions_table="\n".join(questions_section()),
        asked_questions=f"{only('score on real questions', WHOLE)['n']:.0f}",
        asked_documents=f"{only('documents of real questions')['value']:.0f}",
        new_tokens=f"{only('tokens of an answer')['value']:.0f}",
        singles="\n".join(single_section()),
        single=real_single.STRONGEST,
        single_prompts=real_single.PROMPTS,
        at_once=f"{real_single.PROMPTS + only('prompts with gradients')['value']:.0f}",
        gradients=f"{only('prompts with gradients')['value']:.0f}",
        single_shown=SINGLE_SHOWN,
        haystacks=f"{only('share of heads with half of the score', 'all')['n']:.0f}",
        search_haystacks=real_model.HAYSTACKS,
        search_length=max(real_model.LENGTHS),
        blocks="\n".join(blocks_section()),
        **about_documents(),
        **about_blocks(),
        **cost_of_ranking(),
        whole="\n".join(whole_section()),
        **about_whole(),
    )


def write() -> None:
    """Write the page, unless it is there already."""
    pages.write(PAGE, page())


if __name__ == "__main__":
    write()
