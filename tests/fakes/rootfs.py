"""Root file systems of programs that this machine has, as an image would bring them."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


def copy_with_libraries(program: Path, root: Path) -> None:
    """Copy a program into /bin, and what it is linked with to where it looks for it."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    (root / "bin").mkdir(exist_ok=True)
    shutil.copy(program.resolve(), root / "bin" / program.name)
    for library in re.findall(r"(/\S+) \(0x", listed):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(library).resolve(), target)


def copy_shell(root: Path, *more: str) -> None:
    for program in ("sh", "sleep", "cat", "id", *more):
        copy_with_libraries(Path(shutil.which(program) or program), root)


def copy_python(root: Path) -> tuple[str, dict[str, str]]:
    """Copy this Python; return its path inside and the environment that it needs."""
    python = Path(sys.executable).resolve()
    copy_with_libraries(python, root)
    library = Path(sysconfig.get_path("stdlib"))
    inside = root / library.relative_to("/")
    left_out = ("site-packages", "test", "idlelib", "__pycache__", "config-*", "ensurepip")
    shutil.copytree(library, inside, ignore=shutil.ignore_patterns(*left_out))
    for extension in (inside / "lib-dynload").glob("*.so"):
        copy_with_libraries(library / "lib-dynload" / extension.name, root)
    for name in ("models", "tmp"):
        (root / name).mkdir(mode=0o777)
        (root / name).chmod(0o777)
    return f"/bin/{python.name}", {"PYTHONHOME": sys.base_prefix, "PYTHONDONTWRITEBYTECODE": "1"}
