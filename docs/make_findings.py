"""Write the findings of the README from the data of the committed figures.

python docs/make_findings.py
"""

import make_tiny_models
import pages
import pandas as pd
from figure_data import (
    TASKS,
    chance_levels,
    count,
    data,
    expect,
    fixed_share,
    rank_p_values,
    real_model,
    repeated,
    rows,
    settings,
    span,
    with_interval,
)

from cluster import real_model as plan
from mmheads import paths
from mmheads.heads import head_count

README = paths.ROOT / "README.md"
START, END = "<!-- findings: written by docs/make_findings.py -->", "<!-- end of the findings -->"


def real() -> list[str]:
    """Returns what the pretrained text model says that is run here."""
    by_name = real_model()
    right = by_name["right answers"]
    share = by_name["share of heads with half of the score"].loc["all"]
    halves = by_name["heads shared by the halves"].iloc[0]
    whole, losses = right.loc["full model"], []
    for fraction in ("5%", "10%"):
        row, control = right.loc[f"top {fraction}"], f"random {fraction}, same layers"
        left = f"{right.loc[control, 'value']:.0%}" if control in right.index else "not run"
        beside = f"exact p = {row['p']:.1g}; random heads of the same layers: {left}"
        losses.append(
            f"{row['value']:.0%} [{row['low']:.0%}, {row['high']:.0%}] without its strongest "
            f"{fraction} of heads ({beside})"
        )
    control = "random 5%, same layers"
    among = by_name["random sets that do as much harm"].loc[control]
    same = by_name["random sets that do as much harm on the same prompts"].loc[control]
    prose = by_name["loss on prose, added"]["value"]
    added = [f"{prose[name]:.2f}" for name in ("top 5%", control)]
    return [
        f"It answers {whole['value']:.0%} of {whole['n']:.0f} questions about needles in 512 "
        f"tokens, {', and '.join(losses)}.",
        f"On the same prompts, {same['value']:.0f} of {same['n']:.0f} random sets of the same "
        f"layers {'does' if same['value'] == 1 else 'do'} as much harm as the strongest 5% "
        f"({among['value']:.0f} by the rank test, on its least favourable six prompts: p = "
        f"{among['p']:.1g}). On plain prose, its loss rises by {added[0]} nats per token without "
        f"the strongest 5%, and by {added[1]} without random heads.",
        moments(by_name["right answers, some tokens"], right),
        single(by_name),
        f"{share['value']:.1%} of its 336 heads hold half of the retrieval score, and "
        f"{halves['value']:.0f} of the {halves['n']:.0f} strongest are the same on both halves of "
        "the needles.",
        dense(by_name["right answers, dense heads"], by_name["points gained by dense heads"]),
        documents(by_name),
        ranking(),
    ]


def moments(some: pd.DataFrame, right: pd.DataFrame) -> str:
    """Returns at which tokens its answers need the heads."""
    prompt, written = (
        some.loc[plan.when_name(plan.top_name(plan.MAIN), when)] for when in ("prefill", "decode")
    )
    expect(written["high"] < prompt["low"], "the heads are needed at generated tokens")
    return (
        f"It needs them while it writes: with the strongest 5% ablated only at generated tokens, "
        f"{written['value']:.0%} [{written['low']:.0%}, {written['high']:.0%}] of the answers are "
        f"right, and only in the prompt {prompt['value']:.0%} [{prompt['low']:.0%}, "
        f"{prompt['high']:.0%}] (everywhere: {right.loc['top 5%', 'value']:.0%})."
    )


def single(by_name: dict[str, pd.DataFrame]) -> str:
    """Returns what its strongest heads do one by one."""
    lost = by_name["nats lost without one head"]
    foretold = by_name["rank correlation with the nats lost"]
    most, costly = lost["value"].idxmax(), ((lost["p"] < 0.05) & (lost["value"] > 0)).sum()
    expect(foretold.loc["score", "high"] < foretold.loc["gradient", "low"], "gradients tell more")
    score, gradient = (with_interval(foretold.loc[name]) for name in ("score", "gradient"))
    return (
        f"Ablated one by one, {count(costly)} of its {len(lost)} strongest heads are shown to cost "
        f"anything (corrected p below 0.05). {most} costs most ({lost.loc[most, 'value']:.1f} nats "
        f"of log-odds, {lost.loc[most, 'n']:.0f} prompts) and is number "
        f"{lost.index.get_loc(most) + 1} by score. Among these heads, the score says little about "
        f"the loss (Spearman's correlation {score}, an interval over prompts), while the gate "
        f"gradient, an estimate from one backward pass, says much ({gradient})."
    )


def dense(right: pd.DataFrame, gained: pd.DataFrame) -> str:
    """Returns what few dense heads keep of its answers."""
    where = "needle outside the window"
    few = []
    for share in gained.index:
        kept = right.loc[f"{share}, retrieval score, {where}"]
        random = right.loc[f"{share}, random, same layers, {where}", "value"]
        few.append(
            f"{share} keep {kept['value']:.0%} [{kept['low']:.0%}, {kept['high']:.0%}] of "
            f"{kept['n']:.0f} answers right (random heads of the same layers: "
            f"{random:.0%}, {_p(gained.loc[share, 'p'])})"
        )
    return (
        "With all other heads limited to the first 4 tokens and a window of 60 without the needle, "
        f"the strongest {', and the strongest '.join(few)}."
    )


def documents(by_name: dict[str, pd.DataFrame]) -> str:
    """Returns what its answers to questions on real documents lose without its heads."""
    score, lost = by_name["score on real questions"], by_name["lost on real questions"]
    beside = by_name["lost to the selected heads on real questions"].iloc[0]
    whole, top = score.loc["full model"], lost.loc["top 5%"]
    return (
        f"On {whole['n']:.0f} questions whose answer is in the text of a real document, it "
        f"scores {whole['value']:.0%}, and {score.loc['top 5%', 'value']:.0%} without the "
        f"strongest 5% of its heads (points lost: {100 * top['value']:.0f} "
        f"[{100 * top['low']:.0f}, {100 * top['high']:.0f}], {_p(top['p'])}; "
        f"{100 * beside['value']:.0f} more than without random heads of the same layers, "
        f"{_p(beside['p'])}, not corrected, n = {beside['n']:.0f})."
    )


def ranking() -> str:
    """Returns how its heads rank the pages of real documents."""
    table = data("A_table2_heads_real").set_index("method")
    paired = data("X_ranking_paired_real").set_index("against")
    heads = table.loc["strongest 5% of heads"]
    others = {
        "BM25": "BM25",
        "all-MiniLM-L6-v2": "all-MiniLM-L6-v2",
        "random heads, same layers": "random heads of the same layers",
        "strongest 100% of heads": "all heads",
    }
    beside = [
        f"{name} {table.loc[method, 'R@1']:.0%} ({_p(paired.loc[method, 'p_holm'])})"
        for method, name in others.items()
    ]
    *first, last = beside
    return (
        f"On {heads['n']:.0f} questions about {heads['documents']:.0f} real documents, the "
        "attention of the strongest 5% of its heads, which were found on needles, ranks pages with "
        f"a Recall@1 of {heads['R@1']:.0%} [{heads['low']:.0%}, {heads['high']:.0%}]. On the same "
        f"text, {', '.join(first).replace(' ', ' reaches ', 1)}, and {last} (corrected p of the "
        "paired difference in brackets)."
    )


def _p(value: float) -> str:
    return f"p = {value:.2g}"


def released() -> list[str]:
    """Returns what the released scores of large models say."""
    shares, fig5 = data("A_fig3_sparsity_released"), "A_fig5_overlap_released"
    difference = (shares["value"] - shares["paper"]).abs().max()
    kept = rows(fig5, pair="8K&128K").set_index("task")["value"] / 100
    files = data("X_sparsity_lengths_released")[["model", "task", "length"]].drop_duplicates()
    return [
        f"{span(shares['value'] / 100, '.1%')} of the heads hold half of the retrieval score, as "
        f"paper A prints it: its {len(shares)} numbers and ours differ by at most "
        f"{difference:.2f} points.",
        f"From 8K to 128K tokens, the strongest {settings(fig5)['fraction']:.0%} of the heads keep "
        f"{kept.min():.0%} ({TASKS[str(kept.idxmin())]}) to {kept.max():.0%} "
        f"({TASKS[str(kept.idxmax())]}) of their members on average.",
        f"{len(data('X_impossible_scores_released'))} of the {len(files)} released files contain "
        "values that no attention can give.",
    ]


def live() -> list[str]:
    """Returns what the tiny model says that we train and run here."""
    share, fig5 = fixed_share(), "B_fig5_tasks_live"
    ablated = rows("B_fig6_ablation_live", fraction=share).set_index(["ablation", "task"])
    score, draws, chance = ablated["score"], ablated["draws"], chance_levels()
    selected = ", ".join(
        f"{score['selected', task]:.0%} ({name}; chance {chance[task]:.0%})"
        for task, name in TASKS.items()
    )
    control, p_rank = "same layers, none selected", rank_p_values()
    expect(p_rank.min() >= 0.05, "the rank of the selected heads is significant in no task")
    among = rows("X_rank_among_random_live", ablation="random, same layers")
    as_low = among.groupby("task")["as_low"].max()
    shared = rows(fig5, a="text").groupby("b")["overlap"].mean()
    heads = len(rows("B_fig9_heatmaps_live", task="text", score_kind="calibrated"))
    top, lengths = settings(fig5)["fraction"], rows(fig5, a="text")["length"].nunique()
    beside = rows("X_overlap_models_live", source="kept scores")
    others = dict(list(beside.groupby("overlap_of")["value"]))
    structure = make_tiny_models.tables("structure")
    by_chance = [
        make_tiny_models.compared(structure[name], "overlap", "text", "image")["chance"]
        for name in beside["model"].unique()
    ]
    pages = rows("A_table2_generated_live", level="page")
    of_method = pages.groupby("method")
    found, questions = of_method["R@1"].mean(), of_method["n"].sum()["selected heads"]
    return [
        f"Ablating the {ablated['heads'].max()} heads ({share:.0%}) with the highest calibrated "
        f"score for a task leaves {selected} of the answers right, with "
        f"{ablated['n']['selected'].min()} prompts per task. Other random heads of the same layers "
        f"leave {score[control].min():.0%} or more (means of {draws[control].min()} sets). Among "
        f"{among['draws'].max()} random sets "
        "of the same layers that may contain selected heads, "
        f"{span(as_low, '.0f')}, by task, do as much harm "
        "on the fifth of the prompts that favours them most: the rank of the "
        f"selected heads is not significant after correction (p = {span(p_rank, '.2f')}). This "
        f"was repeated with as many prompts: {repeated()}.",
        f"Of the strongest {top:.0%} of the heads for text, {shared['rendered_text']:.0%} are "
        f"among the strongest for rendered text and {shared['image']:.0%} for images (mean of "
        f"{count(lengths)} lengths; chance {head_count(top, heads) / heads:.0%}). In the "
        f"{count(beside['model'].nunique())} other tiny vision-language models it is "
        f"{span(others['text&rendered_text'])} and {span(others['text&image'])} (chance "
        f"{span(by_chance)}, the larger number in the Gemma 3). The order of "
        "training probably produces much of this.",
        "Heads chosen on needles put the right one of the pages of a generated document first for "
        f"{found['selected heads']:.0%} of {questions:,.0f} questions, all heads together for "
        f"{found['all heads']:.0%}, and as many random heads of the same layers for "
        f"{found['random heads, same layers']:.0%}. The other tiny models were not tried.",
    ]


def text() -> str:
    """Returns the findings as the README shows them."""
    model = (
        "From one pretrained text model, in a file that identifies itself as "
        "Qwen2.5-Coder-0.5B-Instruct ([details](docs/real_model.md))"
    )
    large = count(data("A_fig3_sparsity_released")["model"].nunique())
    parts = (
        (model, real()),
        (f"From the released scores of {large} large models", released()),
        ("From tiny models that we train, which say nothing about large ones", live()),
    )
    return "\n\n".join(f"{title}:\n\n" + "\n".join(f"- {x}" for x in xs) for title, xs in parts)


def with_findings(readme: str) -> str:
    """Returns the text of the README with the findings of today.

    Raises:
        ValueError: The README does not have both marks, each once.
    """
    return pages.with_part(readme, START, END, text(), "blocks of findings in README.md")


def write() -> None:
    """Write the findings into the README, unless they are there already."""
    pages.write(README, with_findings(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    write()
