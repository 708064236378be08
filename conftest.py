"""Test settings: where the released scores are, and how nbval runs the notebooks."""

import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest

from mmheads import paths, published, store
from mmheads.scores import HeadScores

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported, which is later

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
RELEASED = published.complete_folder()
"""The folder with all the released scores, if there is one: tests never download."""
NOT_HERE = f"not all released scores are here: {published.HOW_TO_GET}"


@pytest.fixture(scope="session")
def released() -> dict[tuple[str, str, int], HeadScores]:
    """All released scores."""
    if RELEASED is None:
        pytest.skip(NOT_HERE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", published.ImpossibleScoreWarning)
        return published.load_all(folder=RELEASED)


@pytest.fixture(autouse=True)
def _nothing_is_shipped(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests neither read nor write the results that the repository ships."""
    monkeypatch.setattr(store, "SHIPPED", tmp_path_factory.getbasetemp() / "no-shipped-results")


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium without a network; `resize` sets the width of its window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("there is no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)

    def resize(width: int) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    driver.resize = resize
    yield driver
    driver.quit()


def pytest_configure(config: pytest.Config) -> None:
    """Let nbval's kernels import a copy of the repository, so that no test writes to figures/.

    Each worker of pytest-xdist has its own.
    """
    if (config.option.nbval or config.option.nbval_lax) and config.option.dist == "no":
        copy = Path(tempfile.mkdtemp(prefix="mmheads-nbval-"))
        config.add_cleanup(lambda: shutil.rmtree(copy))
        for name in ("benchmarks", "cluster", "mmheads", "data", "figures", "notebooks"):
            shutil.copytree(paths.ROOT / name, copy / name)
        os.environ["PYTHONPATH"] = str(copy)
        os.environ["MMHEADS_PUBLISHED"] = str(RELEASED or copy / "no-released-scores")
        os.environ["MMHEADS_REAL_DOCS"] = str(paths.real_docs() or "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the checked notebook outputs that need the released scores, where there are none."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell and "needs-released" in cell.metadata.get("tags", []) and not RELEASED:
            item.add_marker(pytest.mark.skip(reason=NOT_HERE))
