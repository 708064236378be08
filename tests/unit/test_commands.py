"""The commands as a user runs them: what they print and write, and how they refuse bad input."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import example_prompts
import numpy as np
import pandas as pd
import pytest
import random_models
from PIL import Image

from conftest import NOT_HERE, RELEASED
from mmheads import answers, cli, paths, scoring
from mmheads.models import VLM, load
from mmheads.scores import HeadScores
from mmheads.tasks.needles import GENERATED


@pytest.fixture
def own_images(tmp_path):
    """What a user brings: pages as files, questions in a JSON Lines file."""
    rows = []
    for index, task in enumerate(("rendered_text", "text")):
        example = GENERATED.make(task, 128, 0.4, haystack=index, split="test")
        parts = []
        for number, part in enumerate(example.context):
            if isinstance(part, str):
                parts.append(part)
            else:
                part.save(tmp_path / f"{index}-{number}.png")
                parts.append({"image": f"{index}-{number}.png"})
        (region,) = example.evidence
        where = {"box": region.box} if region.box else {"chars": region.chars}
        rows.append(
            {
                "context": parts,
                "question": example.question[0],
                "answer": example.answer,
                "evidence": [{"part": region.part, **where}],
                "task": task,
            }
        )
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_command_scores_a_users_own_examples(own_images, tmp_path, capsys):
    model = str(paths.MODELS / "tiny-qwen3-vl-m")
    out = tmp_path / "out"
    arguments = ["score", model, str(own_images), "--out", str(out)]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    scores = HeadScores.load(next(out.glob("*.parquet")))
    assert scores.metadata["task"].tolist() == ["rendered_text", "text"]
    expected = scoring.score_heads(
        load(model, device="cpu"),
        [
            GENERATED.make(task, 128, 0.4, haystack=i, split="test")
            for i, task in enumerate(("rendered_text", "text"))
        ],
        progress=False,
    )
    np.testing.assert_allclose(scores.values, expected.values, atol=1e-6)
    table = pd.read_csv(next(out.glob("*.csv")))
    assert len(table) == 2 * 128
    assert {"layer", "head", "score", *scoring.QUANTITIES} <= set(table.columns)
    released = json.loads(next(out.glob("*.json")).read_text())["head_score_list"]
    best = scores.top(count=1).heads[0]
    assert released[0][0] == f"{best.layer}-{best.head}"
    assert printed[0].split()[0] == str(best)
    assert next(out.glob("*.png")).stat().st_size > 1000


@pytest.fixture(scope="module")
def score_file(tmp_path_factory):
    """Scores of the shipped model that choose heads for `rank`."""
    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    examples = [GENERATED.make("rendered_text", 128, depth) for depth in (0.0, 1.0)]
    scores = scoring.score_heads(load("tiny-qwen3-vl-m"), examples, folder=None, progress=False)
    scores.save(path)
    return path


LINE = {"context": ["rain falls . B7 K ."], "question": "? B7", "evidence": [{"part": 0}]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no-such-model could not be loaded"),
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "cuda:0"], "cuda:0"),
        (["--out", "blocked/results"], "blocked/results cannot be written to"),
    ],
)
def test_score_refuses_bad_options_in_one_sentence(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples.jsonl").write_text(json.dumps(LINE), encoding="utf-8")
    (tmp_path / "blocked").write_text("a file where a folder is expected", encoding="utf-8")
    model, examples, *options = {
        "no-such-model": ["no-such-model", "examples.jsonl"],
        "missing.jsonl": ["tiny-qwen3-vl-m", "missing.jsonl"],
    }.get(arguments[0], ["tiny-qwen3-vl-m", "examples.jsonl", *arguments])
    assert cli.main(["score", model, examples, "--out", "out", *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("value", ["1.5", "0", "nan", "-0.1", "five"])
def test_a_share_of_heads_outside_0_to_1_is_refused_before_anything_runs(value, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["score", "m", "e", "--fraction", value])
    assert stopped.value.code == 2
    assert f"{value!r} is not a number from 1e-06 to 1" in capsys.readouterr().err


def test_an_example_without_evidence_is_named_before_the_model_is_loaded(
    tmp_path, capsys, monkeypatch
):
    lines = [LINE, LINE | {"evidence": None}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    monkeypatch.setattr("mmheads.models.load", None)
    assert cli.main(["score", "tiny-qwen3-vl-m", str(path)]) == 1
    assert f"{path}, line 2: the example has no evidence" in capsys.readouterr().err


def test_files_of_one_name_in_two_folders_keep_their_own_results(tmp_path, capsys):
    for folder, text in (("a", "B7 K ."), ("b", "rain falls .")):
        (tmp_path / folder).mkdir()
        line = LINE | {"evidence": [{"part": 0, "text": text}]}
        (tmp_path / folder / "v1.examples.jsonl").write_text(json.dumps(line), encoding="utf-8")
    for folder in ("a", "b"):
        path = tmp_path / folder / "v1.examples.jsonl"
        arguments = [str(path), "--out", str(tmp_path / "out")]
        assert cli.main(["score", "tiny-qwen3-vl-m", *arguments, "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert [len(data["heads"]), data["examples"]] == [7, 1]
        scores = HeadScores.load(data["files"]["parquet"])
        assert data["heads"][0]["score"] == pytest.approx(scores.mean.max())
    for suffix in ("parquet", "csv", "json", "png"):
        assert len(list((tmp_path / "out").glob(f"tiny-qwen3-vl-m-v1.examples-*.{suffix}"))) == 2


def test_rank_orders_the_pages_of_a_pdf_and_draws_them(score_file, tmp_path, capsys):
    example_prompts.write_pdf(tmp_path / "d.pdf", 3)
    command = ["rank", "--model", "tiny-qwen3-vl-m", "--heads", str(score_file)]
    command += ["--out", str(tmp_path / "d.png"), "--window", "2", "--top", "2"]
    question = "? B7 $ ? B7 $"  # not a formula in the title of the picture
    assert cli.main([*command, "--question", question, str(tmp_path / "d.pdf")]) == 0
    printed = capsys.readouterr()
    first, second, picture_line = printed.out.splitlines()
    assert [line.split()[0] for line in (first, second)] == ["1", "2"]
    assert {line.split()[2] for line in (first, second)} < {"1", "2", "3"}
    assert "7 heads of tiny-qwen3-vl-m; 3 pages at 144 dpi in windows of 2" in printed.err
    assert picture_line == str(tmp_path / "d.png")
    with Image.open(tmp_path / "d.png") as picture:
        assert picture.size[0] > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", " "], "a question is empty"),
        (["e.pdf"], "e.pdf does not exist"),
        (["empty.pdf"], "empty.pdf"),
        (["text.pdf"], "text.pdf"),
        (["--heads", "missing.parquet"], "missing.parquet"),
        (["--heads", "table.csv"], "table.csv"),
        (["--model", "no-such-model"], "no-such-model could not be loaded"),
        (["--out", "picture.docx"], "picture.docx; expected the name of a picture"),
        (["--out", "folder.png"], "folder.png is a folder"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_rank_refuses_bad_input_in_one_sentence(
    arguments, message, score_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    example_prompts.write_pdf(tmp_path / "d.pdf", 2)
    (tmp_path / "empty.pdf").write_bytes(b"")
    (tmp_path / "text.pdf").write_text("This is a text.", encoding="utf-8")
    (tmp_path / "table.csv").write_text("layer,head\n0,0\n", encoding="utf-8")
    (tmp_path / "folder.png").mkdir()
    files = [name for name in arguments if name.endswith(".pdf")] or ["d.pdf"]
    options = [word for word in arguments if not word.endswith(".pdf")]
    command = ["rank", "--model", "tiny-qwen3-vl-m", "--heads", str(score_file), "--question", "?"]
    if "--question" in options:
        command = command[:-2]
    assert cli.main([*command, *options, *files]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "d.rank.png").exists()


@pytest.mark.parametrize("option", [["--top", "-1"], ["--window", "0"], ["--dpi", "0"]])
def test_rank_refuses_numbers_out_of_range(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["rank", "d.pdf", "--model", "m", "--heads", "h", "--question", "?", *option])
    assert stopped.value.code == 2
    assert "is not a whole number" in capsys.readouterr().err


def test_a_closed_pipe_is_not_an_error(tmp_path):
    (tmp_path / "examples.jsonl").write_text(json.dumps(LINE), encoding="utf-8")
    command = [sys.executable, "-m", "mmheads", "score", "tiny-qwen3-vl-m"]
    command += [str(tmp_path), "--out", str(tmp_path / "out"), "--fraction", "1"]
    environment = {"PYTHONPATH": str(paths.ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        running.stdout.close()
        error = running.stderr.read().decode()
        assert running.wait() == 0
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


@pytest.mark.parametrize("command", ["score", "ablate"])
def test_an_interrupted_command_goes_on_from_what_is_kept(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    lines = [LINE | {"question": f"? {each}", "answer": "K"} for each in ("B7", "K", "rain")]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 1)
    words = {
        "score": ["tiny-qwen3-vl-m", str(path)],
        "ablate": ["tiny-qwen3-vl-m", "tiny-qwen3-vl-m", str(path), "--draws", "2"],
    }[command]
    words += ["--max-new-tokens", "2"] if command == "ablate" else []
    module, name = {"score": (scoring, "_score_batch"), "ablate": (answers, "_generate")}[command]
    stock, sizes = getattr(module, name), []
    measured = 2 if command == "ablate" else 0

    def interrupted(vlm, batch, *rest):
        if len(sizes) == measured + 1:
            raise KeyboardInterrupt
        sizes.append(len(batch))
        return stock(vlm, batch, *rest)

    monkeypatch.setattr(module, name, interrupted)
    assert cli.main([command, *words]) == 130
    assert "interrupted; what was computed is kept" in capsys.readouterr().err
    kept, sizes = sum(sizes[measured:]), []

    def counted(vlm, batch, *rest):
        sizes.append(len(batch))
        return stock(vlm, batch, *rest)

    monkeypatch.setattr(module, name, counted)
    assert cli.main([command, *words, "--json"]) == 0
    every = {"score": 3, "ablate": 3 * 4}[command]
    assert (kept > 0, sum(sizes[measured:])) == (True, every - kept)
    assert json.loads(capsys.readouterr().out)["heads"]


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code in one language that a page shows."""
    text = (paths.ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.+?)```", text, re.S)


def commands(page: str, name: str) -> list[list[str]]:
    """The words of the commands of one name that a page shows, without the name."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(name)]


def shown_files(page: str) -> None:
    """Write the files of which a page speaks into the current folder."""
    (lines,) = blocks(page, "json")
    Path("examples.jsonl").write_text(lines, encoding="utf-8")
    for index in (1, 2):
        example_prompts.picture(480, 360, index).save(f"page{index}.png")


def test_what_the_readme_shows_for_your_own_model_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    shown_files("README.md")
    names: dict = {}
    exec(blocks("README.md", "python")[1], names)
    assert set(names["answers"]["ablation"]) == {"full model", "without them"}
    assert len(names["scores"].values) == 2
    capsys.readouterr()
    (explored,) = commands("README.md", "mmheads explore")
    assert cli.main(explored) == 0
    (score,) = commands("README.md", "mmheads score")
    assert cli.main(score) == 0
    assert "2 examples" in capsys.readouterr().out
    assert list((tmp_path / "scores").glob("*.parquet"))


@pytest.mark.skipif(RELEASED is None, reason=NOT_HERE)
def test_what_the_readme_shows_for_a_released_model_runs(tmp_path, capsys, monkeypatch):
    """Run it with a random model that has the name and the heads of the large one."""
    model = random_models.with_heads("qwen3_vl", layers=36, heads=32, kv_groups=8)
    processor = random_models.build("qwen3_vl")[1]
    vlm = VLM(model=model, processor=processor, model_id="Qwen/Qwen3-VL-8B-Instruct")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMHEADS_PUBLISHED", str(RELEASED))
    monkeypatch.setattr("mmheads.models.load", lambda name, **_: {vlm.model_id: vlm}[name])
    example_prompts.write_pdf(tmp_path / "report.pdf", 3)
    exec(blocks("README.md", "python")[0], {})
    assert "candidate" in capsys.readouterr().out
    (rank,) = commands("README.md", "mmheads rank")
    assert cli.main(rank) == 0
    assert "heads of Qwen/Qwen3-VL-8B-Instruct; 3 pages at 144 dpi" in capsys.readouterr().err
    assert (tmp_path / "report.rank.png").exists()


def test_what_the_page_on_your_model_shows_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    shown_files("docs/your_model.md")
    (command,) = commands("docs/your_model.md", "mmheads score")
    assert cli.main([*command, "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "2 examples" in capsys.readouterr().out
    (command,) = commands("docs/your_model.md", "mmheads explore")
    assert cli.main([*command, "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert (tmp_path / page["page"]).stat().st_size == page["bytes"] > 10_000
    (ablated,) = commands("docs/your_model.md", "mmheads ablate")
    assert cli.main([*ablated[:-1], "2"]) == 0
    assert "2 random sets are as low" in capsys.readouterr().out
    score, explored, mask, streamed = blocks("docs/your_model.md", "python")
    names: dict = {}
    exec(score, names)
    assert "L" in capsys.readouterr().out
    exec(explored, names)
    exec(mask, names)
    assert "p_holm" in capsys.readouterr().out
    assert set(names["table"]["ablation"]) == {"full model", "top", "random"}
    exec(streamed, names)
    assert "of the KV groups" in capsys.readouterr().out


def test_what_the_page_on_your_documents_shows_runs(score_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(score_file, "scores.parquet")
    example_prompts.write_pdf(tmp_path / "report.pdf", 3)
    (rank,) = blocks("docs/your_documents.md", "python")
    exec(rank, {})
    assert "candidate" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"report.rank.png", "report.safetensors"}
    (command,) = commands("docs/your_documents.md", "mmheads rank")
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "10 heads of tiny-qwen3-vl-m; 3 pages at 144 dpi" in printed.err
    assert printed.out.splitlines()[-1] == "report.rank.png"


def test_what_the_page_on_the_tiny_models_shows_runs(tmp_path, monkeypatch):
    stock, sample = blocks("docs/tiny_models.md", "python")
    monkeypatch.chdir(paths.ROOT)
    names: dict = {}
    exec(stock, names)
    assert type(names["model"]).__name__ == "Qwen3VLForConditionalGeneration"
    monkeypatch.chdir(tmp_path)
    exec(sample, {})
    assert (tmp_path / "sample.png").stat().st_size > 1000


@pytest.mark.parametrize("command", ["", "detect", "rank", "score", "ablate", "explore"])
def test_the_help_shows_examples_that_the_parser_takes(command, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    if command in ("score", "ablate", "explore"):
        assert '"evidence": [{"part": 1, "box": [120, 300, 410, 340]}]' in printed
    shown = [re.split("[|>]", line)[0] for line in printed.splitlines()]
    examples = [shlex.split(line)[1:] for line in shown if line.startswith("    mmheads ")]
    assert examples
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    monkeypatch.setattr("mmheads.models.load", None)
    for words in examples:
        assert cli.main(words) == 1  # a file is missing, or there is no model; not a wrong option
