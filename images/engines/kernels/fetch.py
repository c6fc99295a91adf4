"""Fetch the source of llama.cpp, whose quantization of rows is compiled here too.

    python fetch.py --out TREE

The pin and the program are those of its tools.
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "llamacpp" / "fetch.py"), run_name="__main__")
