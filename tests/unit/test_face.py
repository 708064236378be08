"""The names that `import mmheads` gives."""

import subprocess
import sys
from pathlib import Path

import mmheads


def test_every_public_name_is_there_and_documented():
    for name in mmheads.__all__:
        assert getattr(mmheads, name).__doc__, name
        assert name in dir(mmheads)


def test_importing_the_package_loads_no_heavy_library():
    code = "import mmheads, sys; print(*({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_public_name_is_hidden_by_a_module_once_that_is_imported():
    modules = {path.stem for path in Path(mmheads.__file__).parent.iterdir()}
    assert not modules & set(mmheads.__all__)
