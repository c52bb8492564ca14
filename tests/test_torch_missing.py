"""Without torch: ``fastrnn.torch`` says what to install."""

from __future__ import annotations

import subprocess
import sys


def test_without_torch_the_extra_is_named() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport fastrnn\nimport fastrnn.torch"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last == 'ImportError: fastrnn.torch needs torch: pip install "fastrnn[torch]"'


def test_another_missing_module_is_not_mistaken_for_torch() -> None:
    code = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            raise ModuleNotFoundError('no module sympy', name='sympy')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import fastrnn.torch"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: no module sympy"
