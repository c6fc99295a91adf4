"""Compiles tests and toolchain: `python -m tests.compiled`, before many processes start at once.

Each would compile all of it for itself: of a fresh checkout, twelve seconds of CPU each. pytest
compiles tests its own way, so its own import hook does it here, and runs nothing.
"""

import compileall
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import pytest
from _pytest.assertion import rewrite

from tests.paths import ROOT

_SHARES = os.cpu_count() or 1


class _Compiling:
    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        """Compile in place of running tests."""
        hook: Any = config.pluginmanager.rewrite_hook
        vars(rewrite)["exec"] = lambda *_: None  # what the hook does with a compiled module
        children = []
        for number in range(_SHARES):
            if not (child := os.fork()):
                _compile(hook, number)
                os._exit(0)
            children.append(child)
        return max(os.waitpid(child, 0)[1] for child in children)


def _compile(hook: Any, number: int) -> None:
    """Compile one share."""
    paths = sorted([*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("tests/**/conftest.py")])
    for path in paths[number::_SHARES]:
        spec = spec_from_file_location(path.stem, path, loader=hook)
        assert spec
        hook.exec_module(module_from_spec(spec))
    folders = sorted(path.parent for path in ROOT.glob("toolchain/**/__init__.py"))
    for folder in [*folders, ROOT / "tests", ROOT / "tests" / "fakes"][number::_SHARES]:
        compileall.compile_dir(folder, maxlevels=0, quiet=2)


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider"], plugins=[_Compiling()]))
