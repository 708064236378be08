"""Write the claim of every notebook from the data of the committed figures.

python docs/make_claims.py

The claim is the paragraph of a notebook's first cell that begins with "**Claim.**". Its words are
in `claims.toml`: a name in braces is a key of what the notebook's function here returns. Where the
words compare, the function checks that the data agree.
"""

import json
import re
import tomllib
from pathlib import Path

import pages
import pandas as pd
from figure_data import (
    TASKS,
    by_task,
    chance_levels,
    count,
    data,
    expect,
    fixed_share,
    listed,
    lost_to_chance,
    of_tasks,
    other_models,
    rank_p_values,
    repeated,
    row,
    rows,
    settings,
    span,
)

from mmheads import paths
from mmheads.heads import head_count

MARK = "**Claim.** "
WORDS = tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))
Facts = dict[str, str]


def locate() -> Facts:
    """Returns the numbers of notebook 01."""
    agreement = data("X_locate_agreement_live")
    answers = agreement[["tags", "slices", "offsets"]]
    same, refused = answers == "yes", answers == "refused"
    expect((same | refused).all(axis=None), "the procedures agree wherever they can be applied")
    expect(same.any(axis=1).all(), "every image is found by at least one procedure")
    weights = data("X_box_by_family_live")["weight"]
    expect(weights.min() == 0 and weights.max() == 1, "weights are shares of a token")
    expect(weights.between(0, 1, inclusive="neither").any(), "the box cuts tokens")
    pages = rows("X_tokens_by_family_live", image="page")
    return {
        "procedures": count(answers.shape[1]),
        "images": count(len(agreement)),
        "prompts": count(len(agreement[["family", "prompt"]].drop_duplicates())),
        "families": count(agreement["family"].nunique()),
        "refused": count(refused.sum(axis=None)),
        "tokens": span(pages["tokens"], ",.0f"),
        "sizes": count(pages["family"].nunique()),
    }


def strongest(score_kind: str, size: int) -> dict[str, pd.DataFrame]:
    """Returns the strongest heads of each task in the tiny model, mean over its lengths."""
    return {
        task: rows("B_fig9_heatmaps_live", task=task, score_kind=score_kind)
        .nlargest(size, "score")
        .set_index(["layer", "head"])
        for task in TASKS
    }


def score() -> Facts:
    """Returns the numbers of notebook 02."""
    maps, nulls = "B_fig9_heatmaps_live", "X_null_images_live"
    share = settings(maps)["fraction"]
    of = {task: rows(maps, task=task, score_kind="RAM mass")["score"] for task in TASKS}
    heads, median = len(of["text"]), [scores.median() for scores in of.values()]
    top = head_count(share, heads)
    mass, calibrated = strongest("RAM mass", top), strongest("calibrated", top)
    held = [mass[task]["score"].sum() / scores.sum() for task, scores in of.items()]
    expect(min(held) > 2 * top / heads, "attention to the evidence is concentrated in few heads")
    deepest = max(max(tops[t].index)[0] for tops in (mass, calibrated) for t in TASKS)
    layers = data(maps)["layer"].max() + 1
    expect(deepest + 1 < layers, "the strongest heads are in the first layers")
    kept = {
        (task, shown): round(top * row(nulls, task=task, null_images=shown)["overlap"])
        for task in ("image", "identical_image")
        for shown in ("pixels", "placeholders")
    }
    for task in ("image", "identical_image"):
        expect(
            kept[task, "pixels"] < kept[task, "placeholders"], f"images shown cost heads: {task}"
        )
    others = other_models("X_score_models_live")
    of_model = others.groupby("model")["deepest"].max()
    left = row(nulls, task="image", null_images="pixels")
    expect(left["left_high"] < 0, "with the question's images the score falls below zero")
    return {
        "share": f"{share:.0%}",
        "top": count(top),
        "heads": count(heads),
        "held": span(held),
        "tasks": count(len(TASKS)),
        "first": count(deepest + 1),
        "layers": count(layers),
        "strongest": of_tasks(f"{scores.max():.2f}" for scores in of.values()),
        "median": span(median, ".2f"),
        "kept": count(min(len(mass[t].index.intersection(calibrated[t].index)) for t in TASKS)),
        "few_lengths": count(left["haystacks"] / settings(nulls)["haystacks"]),
        "haystacks": count(left["haystacks"]),
        "image_pixels": count(kept["image", "pixels"]),
        "identical_pixels": count(kept["identical_image", "pixels"]),
        "image_placeholders": count(kept["image", "placeholders"]),
        "identical_placeholders": count(kept["identical_image", "placeholders"]),
        "models": count(len(of_model)),
        "others_held": span(others["held"]),
        "others_kept": count(others["kept"].min()),
        "shallow": count((of_model <= deepest).sum()),
        "left": f"{left['left']:.3f} [{left['left_low']:.3f}, {left['left_high']:.3f}]",
    }


def sparsity() -> Facts:
    """Returns the numbers of notebook 03."""
    shares, spread = data("A_fig3_sparsity_released"), "X_head_spread_released"
    difference = (shares["value"] - shares["paper"]).abs().max()
    expect(difference < 0.1, "the numbers are those that paper A prints, to its last digit")
    lengths = data("X_sparsity_lengths_released")
    given = "KV groups, given the layers"
    units = {unit: rows(spread, unit=unit) for unit in ("layers", "KV groups", given)}
    units = {unit: of[of["model"].str.startswith("Qwen")] for unit, of in units.items()}
    for unit, of in units.items():
        expect((of["top"] < of["random"]).all(), f"the strongest heads lie in fewer {unit}")
    fewer = {unit: (of["p_holm"] < 0.05).sum() for unit, of in units.items()}
    means = lengths[lengths["model"].str.startswith("Gemma")]
    means = means.groupby(["rule", "model", "task"])["value"].mean()
    paper, of_all, of_global = (
        means[rule]
        for rule in (
            "all layers, as the paper",
            "global layers, of all heads",
            "global layers, of global heads",
        )
    )
    expect((of_all < paper).all(), "without sliding heads, fewer heads of Gemma 3 hold half")
    expect((of_global > paper).all(), "of Gemma 3's global heads, a larger share holds half")
    return {
        "models": count(shares["model"].nunique()),
        "range": span(shares["value"] / 100, ".1%"),
        "lengths": count(lengths["length"].nunique()),
        "numbers": count(len(shares)),
        "difference": f"{difference:.2f}",
        "qwen": count(units["layers"]["model"].nunique()),
        "length": f"{settings(spread)['spread_length'] // 1024}K tokens",
        "share": f"{settings(spread)['fraction']:.0%}",
        "layers": count(fewer["layers"]),
        "groups": count(fewer["KV groups"]),
        "given": count(fewer[given]),
        "compared": count(len(units["layers"])),
        "impossible": count(len(data("X_impossible_scores_released"))).capitalize(),
        "files": count(len(lengths[["model", "task", "length"]].drop_duplicates())),
        "of_all": span(of_all / 100, ".1%"),
        "of_global": span(of_global / 100, ".1%"),
    }


def released_chance() -> pd.Series:
    """Returns the overlap of two random top sets, for each released model."""
    share = settings("B_fig5_tasks_released")["fraction"]
    heads = rows("X_mass_held_released", unit="heads").groupby("model")["of"].first()
    means = data("X_sparsity_lengths_released").groupby(["rule", "model"])["value"].mean()
    eligible = means["global layers, of all heads"] / means["global layers, of global heads"]
    return heads.map(lambda size: head_count(share, size)) / (heads * eligible)


def stability() -> Facts:
    """Returns the numbers of notebook 04."""
    chance = released_chance()
    for name in ("B_fig5_tasks_released", "X_lengths_released"):
        least = data(name).groupby("model")["overlap"].min()
        expect((least > chance[least.index]).all(), f"overlaps are above chance: {name}")
    gemma = chance.index.str.startswith("Gemma")
    fig5 = data("A_fig5_overlap_released")
    pair = max(fig5["pair"], key=lambda text: int(text.split("&")[1].removesuffix("K")))
    kept = by_task("A_fig5_overlap_released", "value", pair=pair) / 100
    shared = rows("A_fig10_summary_released", statistic="mean").set_index("pair")["value"]
    defects = data("X_stability_defects_released")
    odd = defects.loc[(defects["spearman"] - defects["overlap"]).idxmax()]
    expect(odd["choice"] == "all layers", "the two measures differ most over all layers")
    return {
        "models": count(len(chance)),
        "chance_qwen": span(chance[~gemma]),
        "chance_gemma": span(chance[gemma]),
        "pair": pair.replace("&", " to "),
        "share": f"{settings('A_fig5_overlap_released')['fraction']:.0%}",
        "least": hyphened(kept.idxmin()),
        "most": hyphened(kept.idxmax()),
        "kept_least": f"{kept.min():.0%}",
        "kept_most": f"{kept.max():.0%}",
        "rendered": f"{shared['text&rendered_text']:.0%}",
        "image": f"{shared['text&image']:.0%}",
        "odd": odd["model"].replace("Gemma3-", "Gemma 3 "),
        "odd_task": hyphened(odd["task"]),
        "odd_spearman": f"{odd['spearman']:.2f}",
        "odd_pair": pair.replace("&", " and "),
        "odd_overlap": f"{odd['overlap']:.0%}",
    }


def hyphened(task: object) -> str:
    """Returns the name of a task before a noun: "rendered-text"."""
    return TASKS[str(task)].replace(" ", "-")


def ablations() -> Facts:
    """Returns the numbers of notebook 05."""
    fig6, rankings, ranks = (
        "B_fig6_ablation_live",
        "X_control_rankings_live",
        "X_rank_among_random_live",
    )
    share, lost = fixed_share(), lost_to_chance()
    paper = settings("A_fig5_overlap_released")["fraction"]
    expect(share > paper, f"the share that was fixed is above the papers' {paper:.0%}")
    selected = rows(fig6, fraction=share, ablation="selected")
    kinds = ("full model", "selected", "same layers, none selected")
    whole, left, others = (by_task(fig6, "score", fraction=share, ablation=kind) for kind in kinds)
    p = by_task("X_selected_against_random_live", "p_holm", fraction=share)
    expect((left < others).all() and p.max() < 0.05, "selected heads cost more than all others")
    p_rank = rank_p_values()
    expect(p_rank.min() >= 0.05, "the rank of the selected heads is significant in no task")
    as_low = rows(ranks, ablation="random, same layers").groupby("task")["as_low"].max()
    size = selected["heads"].max()
    tops = strongest("calibrated", size)
    shared = [len(tops[a].index.intersection(tops[b].index)) for a in TASKS for b in TASKS if a < b]
    expect(min(shared) > size / 2, "the tasks share most of their heads")
    of_set = {b: by_task(rankings, "score", ablation=f"heads of {TASKS[b]}") for b in TASKS}
    within = max(abs(of_set[b][a] - of_set[a][a]) for a in TASKS for b in TASKS)
    expect(within < min(whole - left), "each set takes down the other tasks too")
    auroc = {
        by: by_task("X_cause_agreement_live", "auroc", a=by, b="effect")
        for by in ("score", "gradient")
    }
    texts, images = ["text", "rendered_text"], ["image", "identical_image"]
    better = auroc["score"] > auroc["gradient"]
    expect(better[texts].all(), "the score finds the heads that matter to text better")
    expect(not better[images].any(), "the gradient finds the heads that matter to images better")
    by_first = by_task("X_one_by_one_live", "accuracy", ablation="only layer 0")
    expect((by_first - left).max() < 0.1, "the first layer's heads do nearly all of the harm")
    (in_first,) = {sum(layer == 0 for layer, _ in top.index) for top in tops.values()}
    chance = chance_levels()
    return {
        "n": span(selected["n"], ".0f"),
        "length": count(settings(fig6)["length"]),
        "size": count(size),
        "heads": count(len(rows("X_cause_live", task="text", model=settings(fig6)["model"]))),
        "share": f"{share:.0%}",
        "whole": span(whole),
        "selected": listed(
            f"{left[t]:.0%} ({name}; chance {chance[t]:.0%})" for t, name in TASKS.items()
        ),
        "others": of_tasks(f"{value:.0%}" for value in others),
        "draws": count(rows(ranks, ablation="random, same layers")["draws"].min()),
        "as_low": of_tasks(f"{as_low[task]}" for task in TASKS),
        "p_rank": of_tasks(f"{p:.2f}" for p in p_rank),
        "first": count(in_first),
        "by_first": of_tasks(f"{value:.0%}" for value in by_first),
        "paper_share": f"{paper:.0%}",
        "paper_lost": f"{lost[paper]:.0%}",
        "lost": f"{lost[share]:.0%}",
        "fall": f"{settings('X_fraction_live')['fall']:.0%}",
        "at_paper": of_tasks(
            f"{v:.0%}" for v in by_task(fig6, "score", fraction=paper, ablation="selected")
        ),
        "repeated": repeated(),
        "sets": count(len(TASKS)),
        "shared": span(shared, ".0f"),
        "within": f"{100 * within:.0f}",
        "by_score": span(auroc["score"][texts], ".2f"),
        "by_gradient": span(auroc["gradient"][texts], ".2f"),
        "image_score": span(auroc["score"][images], ".2f"),
        "image_gradient": span(auroc["gradient"][images], ".2f"),
    }


def retrieval() -> Facts:
    """Returns the numbers of notebook 06."""
    table, heads, paired = (
        f"{name}_live" for name in ("A_table2_generated", "X_retrieval_heads", "X_retrieval_paired")
    )
    made = settings(table)
    first = data(table).set_index(["method", "level", "kind"])["R@1"].sort_index()
    chosen, every = first["selected heads"], first["all heads"]
    random = first["random heads, same layers"]["page"]
    by_chance = rows(paired, against="random heads, same layers")
    shown = (by_chance["low"] > 0) & (by_chance["p_holm"] < 0.05)
    expect(shown.all(), "selected heads find more than random heads of the same layers")
    beside_all = rows(paired, level="page", against="all heads")
    more = beside_all[(beside_all["low"] > 0) & (beside_all["p_holm"] < 0.05)]
    expect((beside_all["value"] > 0).all(), "selected heads find more pages than all heads")
    expect(0 < len(more) < len(beside_all), "more in some kinds of documents, not shown in others")
    real, beside = "A_table2_heads_real", "X_ranking_paired_real"
    ranked = row(real, method="strongest 5% of heads")
    others = {
        "real_all": "strongest 100% of heads",
        "real_random": "random heads, same layers",
        "real_dense": "all-MiniLM-L6-v2",
        "real_words": "BM25",
    }
    for name, other in others.items():
        shown = row(beside, against=other)
        better = shown["low"] > 0 and shown["p_holm"] < 0.05
        expect(better != (name in ("real_words", "real_dense")), f"the heads beside {other}")
    costs = data("X_retrieval_cost_live").dropna(subset="variant").set_index("variant")
    (tokens,) = costs["tokens"].unique()
    return {
        "size": count(rows(heads, method="selected heads", share=made["fraction"])["heads"].max()),
        "heads": count(rows(heads, share=1)["heads"].max()),
        "pages": count(made["pages"]),
        "codes": span(chosen["page", "rendered_text"], ".0%"),
        "icons": span(chosen["page", "icon"], ".0%"),
        "lines": span(chosen["layout"], ".0%"),
        "kinds": count(len(beside_all)),
        "n": count(made["documents"]),
        "draws": count(made["draws"]),
        "random": span(random, ".0%"),
        "all_codes": span(every["page", "rendered_text"], ".0%"),
        "all_icons": span(every["page", "icon"], ".0%"),
        "better": count(len(more)),
        "gain": span(100 * more["value"], ".0f"),
        "tokens": f"{tokens:,.0f}",
        "cost": f"{costs['time_ratio']['20th question']:.1%}",
        "prefix": f"{costs['time_ratio']['question after a prefix cache']:.1%}",
        "real_documents": count(ranked["documents"]),
        "real_share": str(ranked["method"]).split()[1],
        "real_heads": f"{ranked['R@1']:.0%} [{ranked['low']:.0%}, {ranked['high']:.0%}]",
        "real_n": count(ranked["n"]),
        **{name: f"{row(real, method=other)['R@1']:.0%}" for name, other in others.items()},
    }


def latency() -> Facts:
    """Returns the numbers of notebook 07."""
    answers, times = "X_streaming_accuracy_live", "B_fig7_latency_live"
    made, timed = settings(answers), settings(times)
    share = {"share": made["sweep_share"]}
    kept, whole, random, together = (
        by_task(answers, "score", ablation=name, **share)
        for name in ("retrieval score", "full model", "random", "all four tasks")
    )
    p = by_task("X_streaming_pairs_live", "p_holm", **share).max()
    expect(p < 0.05, "dense retrieval heads keep significantly more than random ones")
    union = row(answers, task="text", ablation="all four tasks", **share)["heads"]
    expect((kept > random).all(), "dense retrieval heads keep more answers than random ones")
    dense = row(answers, task="text", ablation="retrieval score", **share)
    other = row(answers, task="text", ablation="random", **share)
    settings_of_times = (timed["time_sinks"], timed["time_window"])
    expect(settings_of_times != (made["sinks"], made["window"]), "speed has other settings")
    longest = sorted(timed["prefill_lengths"])[-2:]
    speed = {
        scope: [row(times, scope=scope, variant="streaming", tokens=n)["speed_up"] for n in longest]
        for scope in ("attention", "whole model")
    }
    expect(min(min(each) for each in speed.values()) > 1, "window heads make the prefill faster")
    about = row(times, scope="attention", variant="streaming", tokens=longest[0])
    layers, cores = (
        int(re.search(pattern, about[column])[1])
        for pattern, column in ((r"(\d+) layers", "model"), (r"(\d+) of \d+ CPU", "machine"))
    )
    n, both = dense["n"], "B_fig7_latency_real"
    real = {
        name: rows(both, of="answers", ablation=name).sort_values("share")
        for name in ("retrieval score", "random, same layers", "full model")
    }
    for few, random_few in zip(*(real[name]["score"] for name in list(real)[:2]), strict=True):
        expect(few > random_few + 0.2, "dense heads keep more of the pretrained model's answers")
    prefills = rows(both, of="prefill").query("dense_heads < 1").groupby("tokens")["speed_up"]
    return {
        "real_shares": listed(f"{share:.0%}" for share in real["retrieval score"]["share"]),
        "real_kept": listed(f"{value:.0%}" for value in real["retrieval score"]["score"]),
        "real_n": count(real["retrieval score"]["n"].iloc[0]),
        "real_whole": f"{real['full model']['score'].iloc[0]:.0%}",
        "real_random": listed(f"{value:.0%}" for value in real["random, same layers"]["score"]),
        "real_speed": listed(f"{span(of, '.2f')} at {n:,.0f} tokens" for n, of in prefills),
        "length": count(made["length"]),
        "size": count(dense["heads"]),
        "heads": count(row(answers, task="text", ablation="full model", **share)["heads"]),
        "sinks": count(made["sinks"]),
        "window": count(made["window"]),
        "n": count(n),
        "kept": of_tasks(f"{n * value:.0f}" for value in kept),
        "tasks": count(len(TASKS)),
        "union": count(union),
        "together": of_tasks(f"{n * value:.0f}" for value in together),
        "p": f"{p:.0e}",
        "whole": span(n * whole, ".0f"),
        "random": of_tasks(f"{value:.0%}" for value in random),
        "draws": count(other["draws"]),
        "layers": count(layers),
        "time_sinks": count(settings_of_times[0]),
        "time_window": count(settings_of_times[1]),
        "cores": count(cores),
        "faster": listed(f"{value:.1f}" for value in speed["attention"]),
        "overall": listed(f"{value:.1f}" for value in speed["whole model"]),
        "lengths": listed(f"{n // 1024}K" for n in longest),
        "repeats": count(timed["repeats"]),
    }


FACTS = {
    "01_locate_evidence": locate,
    "02_score_heads": score,
    "03_sparsity_curves": sparsity,
    "04_spearman_stability": stability,
    "05_ablations": ablations,
    "06_retrieval": retrieval,
    "07_latency": latency,
}
"""The function that gives the numbers of a notebook's claim."""


def text(notebook: str) -> str:
    """Returns the claim of a notebook.

    Raises:
        ValueError: The data lack a number, or no longer agree with a comparison.
    """
    try:
        facts = FACTS[notebook]()
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"The claim of notebook {notebook} cannot be made: {error}") from error
    return " ".join(WORDS[notebook].split()).format_map(facts)


def with_claim(content: str, claim: str) -> str:
    """Returns the text of a notebook's file with this claim; nothing else changes.

    Raises:
        ValueError: The first cell does not have one line that begins with the mark of a claim.
    """
    notebook = json.loads(content)
    source = notebook["cells"][0]["source"]
    places = [index for index, line in enumerate(source) if line.startswith(MARK)]
    if len(places) != 1:
        raise ValueError(f"the first cell has {len(places)} lines with {MARK!r}, expected one")
    source[places[0]] = f"{MARK}{claim}\n"
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def notebook_path(notebook: str) -> Path:
    """Returns the file of a notebook."""
    return paths.NOTEBOOKS / f"{notebook}.ipynb"


def write() -> None:
    """Write the claims into the notebooks, where they are not there already."""
    for notebook in FACTS:
        path = notebook_path(notebook)
        pages.write(path, with_claim(path.read_text(encoding="utf-8"), text(notebook)))


if __name__ == "__main__":
    write()
