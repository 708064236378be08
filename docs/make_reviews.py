"""Write the page of what reviewers asked, `docs/reviews.md`, from its words and the figures' data.

python docs/make_reviews.py

The words are in `reviews.md.in`: a name in braces is a key of what `facts` returns. Where the words
compare, `facts` checks that the data agree.
"""

from pathlib import Path

import pages
from figure_data import (
    TASKS,
    by_task,
    chance_levels,
    count,
    data,
    expect,
    fixed_share,
    of_tasks,
    rank_p_values,
    real_model,
    row,
    rows,
    with_interval,
)

PAGE = Path(__file__).with_name("reviews.md")
WORDS = PAGE.with_name("reviews.md.in")
SAME_LAYERS = "random, same layers"
RANDOM = "random 5%, same layers"
QUIET = ("attention to context", "low text entropy")


def facts() -> dict[str, str]:
    """Returns the numbers of the page."""
    return {**tiny(), **loud(), **real()}


def tiny() -> dict[str, str]:
    """Returns what the tiny model says of random heads, of a task without evidence, and of cost."""
    share, fig6 = fixed_share(), "B_fig6_ablation_live"
    others = by_task(fig6, "score", fraction=share, ablation="same layers, none selected")
    average = by_task(fig6, "score", fraction=share, ablation=SAME_LAYERS)
    ranks, p = rows("X_rank_among_random_live", ablation=SAME_LAYERS), rank_p_values()
    expect(p.min() >= 0.05 and p.idxmax() == "text", "no rank is significant, least that of text")
    costs = data("X_retrieval_cost_live").set_index("variant")["time_ratio"]
    rankings, sets = "X_control_rankings_live", [f"heads of {name}" for name in TASKS.values()]
    control = [row(rankings, task="successor", ablation=name)["score"] for name in sets]
    alone = [row(rankings, task="text alone", ablation=name)["score"] for name in sets]
    expect(max(alone) <= chance_levels()["text"], "text without pages is answered as by chance")
    as_low = ranks.groupby("task")["as_low"].max()
    expect(as_low.max() < 0.2 * ranks["draws"].min(), "few random sets do as much harm")
    return {
        "others": f"{others.min():.0%}",
        "draws": count(ranks["draws"].min()),
        "as_low": of_tasks(f"{as_low[task]}" for task in TASKS),
        "average": f"{average['text']:.0%}",
        "cost": f"{costs['20th question']:.1%}",
        "prefix": f"{costs['question after a prefix cache']:.1%}",
        "control": f"{min(control):.0%}",
    }


def loud() -> dict[str, str]:
    """Returns what heads cost that are chosen by how loud they are."""
    name, share = "X_loud_heads_live", fixed_share()
    selected, *others = (
        by_task(name, "score", fraction=share, ablation=ablation)
        for ablation in ("calibrated score", "output norm", *QUIET)
    )
    images = ["image", "identical_image"]
    expect((others[0] - selected)[images].max() < 0.15, "loud heads cost as much: images")
    expect(
        row("X_control_rankings_live", task="text", ablation="output norm")["score"] < 0.25,
        "ranked over all tasks, loud heads cost most answers to text",
    )
    heads = row(name, task="text", fraction=share, ablation="output norm")["heads"]
    return {
        "loud_heads": count(heads),
        "loud": f"{1 - min(scores['text'] for scores in others):.0%}",
        "loud_selected": f"{1 - selected['text']:.0%}",
    }


def real() -> dict[str, str]:
    """Returns what the pretrained text model says."""
    fig6, prose, bands = "B_fig6_ablation_real", "X_prose_real", data("B_fig6_bands_real")
    right = "right answers"
    whole = row(fig6, quantity=right, ablation="full model")
    left = row(fig6, quantity=right, ablation="top", percent=5)["value"]
    ranked = row(fig6, quantity="random sets that do as much harm", percent=5)
    random = row(fig6, quantity=right, ablation=SAME_LAYERS, percent=5)["value"]
    same = real_model()["random sets that do as much harm on the same prompts"].loc[RANDOM]
    added = {
        about: row(prose, quantity="loss on prose, added", about=about)["value"]
        for about in ("top 5%", RANDOM)
    }
    expect(left < random, "the strongest heads cost more answers than random ones")
    expect(max(added.values()) < 0.1, "the model is not broken without its heads")
    foretold = real_model()["rank correlation with the nats lost"]
    first, second = (band for _, band in bands.iloc[:2].iterrows())
    return {
        **{f"single_{name}": with_interval(found) for name, found in foretold.iterrows()},
        "real_share": "5%",
        "real_left": f"{left:.0%}",
        "real_random": f"{random:.0%}",
        "real_same": count(same["value"]),
        "real_draws": count(same["n"]),
        "real_as_low": count(ranked["value"]),
        "real_p": f"{ranked['p']:.2f}",
        "prose": f"{added['top 5%']:.3f}",
        "prose_random": f"{added[RANDOM]:.3f}",
        "real_n": count(whole["n"]),
        "real_whole": count(whole["n"] * whole["value"]),
        "first_band": first["about"].removeprefix("rank "),
        "first_right": count(first["n"] * first["value"]),
        "second_band": second["about"].removeprefix("rank "),
        "second_right": count(second["n"] * second["value"]),
    }


def text() -> str:
    """Returns the page.

    Raises:
        ValueError: The data lack a number, or no longer agree with a comparison.
    """
    return WORDS.read_text(encoding="utf-8").format_map(facts())


def write() -> None:
    """Write the page, unless it is there already."""
    pages.write(PAGE, text())


if __name__ == "__main__":
    write()
