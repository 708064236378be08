"""README and documentation: links and pictures resolve, generated parts are up to date."""

import html
import importlib.util
import re
import string
import subprocess
import sys
import tomllib
from pathlib import Path
from textwrap import dedent
from urllib.parse import unquote

import nbformat
import pytest

import mmheads
import reproduce
from mmheads import cli, figures, paths

DOCS = paths.ROOT / "docs"
README = paths.ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.M | re.S)
MOST_LINES_OF_THE_README = 150
FIRST_CODE_OF_THE_README = 40


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def script(name: str):
    """A script of `docs/` as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as a code host makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", read(page)), re.M)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_internal_link_and_picture_resolves(page):
    targets = LINK.findall(FENCED.sub("", read(page)))
    assert targets, "a page without a link leads nowhere"
    for target in targets:
        if re.match(r"https?://", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert path.is_relative_to(paths.ROOT), target
        if anchor:
            assert anchor in anchors(path), target


def test_every_page_is_in_the_table_of_contents():
    entries = {
        line
        for block in TOCTREE.findall(read(DOCS / "index.md"))
        for line in block.splitlines()
        if line and not line.startswith(":")
    }
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert entries == pages | {"/notebooks/*", "/data/models/*/README"}


def test_the_page_of_figures_is_what_its_script_writes():
    assert read(DOCS / "figures.md") == script("make_figures_page").page(), (
        "run python docs/make_figures_page.py"
    )


def test_the_page_of_the_real_model_is_what_its_script_writes():
    assert read(DOCS / "real_model.md") == script("make_real_page").page(), (
        "run python docs/make_real_page.py"
    )


def test_the_page_of_figures_shows_every_figure_with_its_notebook():
    page = read(DOCS / "figures.md")
    names = {Path(entry["file"]).stem: entry["notebook"] for entry in figures.manifest()}
    parts = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, re.M | re.S))
    assert parts.keys() == names.keys()
    for name, notebook in names.items():
        assert f"../notebooks/{notebook}.ipynb" in parts[name]
        pictured = (paths.FIGURES / f"{name}.png").exists()
        assert (f"](../figures/{name}.png)" if pictured else "|") in parts[name]


def test_the_page_of_figures_shows_the_papers_numbers_beside_ours():
    rows = re.findall(r"^\| A, Fig\. 3 \| .+, image \| (.+) \|$", read(DOCS / "figures.md"), re.M)
    ((paper, released, live, *_),) = (row.split(" | ") for row in rows)
    assert paper == "5 to 8.3 (6 values)"
    assert released == "5.05 to 8.35 (6 values)"
    one_model, several = r"[\d.]+ \[[\d.]+, [\d.]+\], n = \d+", r"[\d.]+ to [\d.]+ \(\d+ values\)"
    assert re.fullmatch(f"{one_model}|{several}", live)


def test_a_row_of_the_overview_that_the_data_lack_is_named():
    cell = script("make_figures_page").Cell("A_fig3_sparsity_released", "value", {"task": "music"})
    with pytest.raises(ValueError, match=r"A_fig3_sparsity_released\.csv has no 'value' where"):
        cell.text()


def test_the_findings_of_the_readme_are_those_of_the_committed_data():
    readme = read(README)
    assert script("make_findings").with_findings(readme) == readme, (
        "run python docs/make_findings.py"
    )
    with pytest.raises(ValueError, match="0 blocks of findings"):
        script("make_findings").with_findings("# mmheads")


def test_the_page_of_reviews_is_that_of_the_committed_data():
    made = script("make_reviews")
    assert made.text() == read(DOCS / "reviews.md"), "run python docs/make_reviews.py"
    fields = {name for _, name, *_ in string.Formatter().parse(made.WORDS.read_text()) if name}
    assert fields == made.facts().keys()


def test_the_comparison_of_the_tiny_models_is_that_of_their_cards():
    page, made = read(DOCS / "tiny_models.md"), script("make_tiny_models")
    assert made.with_comparison(page) == page, "run python docs/make_tiny_models.py"
    with pytest.raises(ValueError, match="0 comparisons"):
        made.with_comparison("# The tiny models")
    for model, table in made.tables("structure").items():
        for name in (model, f"[card](../data/models/{model}/README.md)"):
            assert name in page
        rho = table.query("measure == 'rho' and a == 'text'")["value"].item()
        assert re.search(rf"^\| {model} \| {100 * rho:.1f} \|", page, re.M)


def test_the_readme_is_short_and_soon_shows_code():
    lines = read(README).splitlines()
    assert len(lines) <= MOST_LINES_OF_THE_README
    assert next(number for number, line in enumerate(lines, 1) if line == "```python") <= (
        FIRST_CODE_OF_THE_README
    )
    assert len(re.findall(r"^!\[", read(README), re.M)) == 1


def test_every_public_name_is_on_the_page_of_the_api():
    directives = re.findall(r"^\.\. auto(function|class):: ([\w.]+)$", read(DOCS / "api.md"), re.M)
    named = {name: kind for kind, name in directives}
    assert set(mmheads.__all__) == {name for name in named if "." not in name}
    for name, kind in named.items():
        module, _, attribute = f"mmheads.{name}".replace("mmheads.mmheads.", "mmheads.").rpartition(
            "."
        )
        value = getattr(importlib.import_module(module), attribute)
        assert value.__doc__
        assert isinstance(value, type) == (kind == "class"), name


def test_the_files_that_the_page_of_the_api_names_are_there():
    rows = re.findall(r"^\| (`.+?) \|", read(DOCS / "api.md"), re.M)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(named) > 20
    assert [name for name in named if not (paths.ROOT / name).exists()] == []


def test_the_code_of_the_worked_example_is_that_of_the_package():
    blocks = re.findall(
        r"^```python\n# (\S+), in \w+\n(.*?)^```", read(DOCS / "adding_a_family.md"), re.M | re.S
    )
    assert len(blocks) == 4
    for file, code in blocks:
        lines = [line.rstrip() for line in read(paths.ROOT / file).split("\n")]
        expected = code.rstrip().split("\n")
        starts = [
            number
            for number in range(len(lines) - len(expected) + 1)
            if dedent("\n".join(lines[number : number + len(expected)])).split("\n") == expected
        ]
        assert len(starts) == 1, f"{file} has changed; update the worked example: {expected[0]}"


def commands(page: Path) -> list[str]:
    """The commands that a page shows, without comments."""
    blocks = re.findall(r"^```(?:sh|powershell)\n(.*?)^```", read(page), re.M | re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_exist(page, capsys):
    targets = set(re.findall(r"^([\w-]+):", read(paths.ROOT / "Makefile"), re.M))
    for command in commands(page):
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets
        elif "reproduce.py" in command and len(words) > 2:
            options = command.partition("reproduce.py")[2].split("'")[0].split()
            assert reproduce.parse_arguments(options)
        elif words[0] == "mmheads":
            with pytest.raises(SystemExit) as stopped:
                cli.main([words[1], "--help"])
            assert stopped.value.code == 0
            shown = capsys.readouterr().out
            assert [word for word in words if word[:2] == "--" and word not in shown] == []
        elif "-m" in words:
            module = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module), module
            for argument in words:
                if argument.startswith(("tests/", "data/")):
                    assert (paths.ROOT / argument).exists(), argument


def test_the_extra_for_the_documentation_is_a_part_of_the_one_for_development():
    extras = tomllib.loads(read(paths.ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    assert extras["docs"]
    assert set(extras["docs"]) <= set(extras["dev"])


def test_windows_users_get_the_command_of_make_docs():
    recipe = re.search(r"^\t\$\(BIN\)/python (-m sphinx .+)$", read(paths.ROOT / "Makefile"), re.M)
    assert recipe[1].replace("-q ", "") in read(DOCS / "reproducing.md")


def words_of(text: str) -> str:
    """The words of a text without its marks, separated by single spaces."""
    return " ".join(re.findall(r"\w+", html.unescape(text)))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of the documentation, built without a warning."""
    for module in ("sphinx", "myst_nb", "furo"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install --editable '.[docs]'")
    before = {page: read(page) for page in PAGES}
    folder = tmp_path_factory.mktemp("docs")
    options = ("-q", "-W", "--keep-going", "-c", "docs", "-d", str(folder / "doctrees"))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ".", str(folder / "html")],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {page: read(page) for page in PAGES} == before
    return folder / "html"


OPENED = ("docs/index.html", "docs/figures.html", "docs/api.html", "notebooks/02_score_heads.html")


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_of_the_documentation_open_in_a_browser(built, browser, width):
    browser.resize(width)
    for name in OPENED:
        browser.get((built / name).as_uri())
        said = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert said == [], name
        broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
        assert browser.execute_script(broken) == 0, name
        assert browser.execute_script("return document.body.innerText.length") > 500, name
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} px wide"


def test_the_documentation_holds_every_page_picture_and_public_name(built):
    for page in DOCS.glob("*.md"):
        assert (built / "docs" / f"{page.stem}.html").stat().st_size > 1000
    api = read(built / "docs" / "api.html")
    shown = words_of(re.sub(r"<[^>]+>", "", api))
    for name in mmheads.__all__:
        assert f'id="mmheads.{name}"' in api, name
        assert words_of(getattr(mmheads, name).__doc__.split("\n\n")[0]) in shown, name
    for path in paths.NOTEBOOKS.glob("*.ipynb"):
        page = read(built / "notebooks" / f"{path.stem}.html")
        cells = nbformat.read(path, as_version=4).cells
        pictures = sum(
            "image/png" in output.get("data", {})
            for cell in cells
            for output in cell.get("outputs", [])
        )
        assert page.count("/_images/") >= pictures, path.stem
    for page in built.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)\b[^>]+(?:src|href)="(https?://[^"]+)', read(page)
        )
        assert not loaded, f"{page.name} loads from the network: {loaded}"
        for target in re.findall(r'(?:src|href)="([^"#?]+)', read(page)):
            if not re.match(r"\w+:", target):
                assert (page.parent / unquote(target)).exists(), f"{page.name}: {target}"
