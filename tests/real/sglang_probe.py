"""Asks SGLang's own argument parser; of the packages that SGLang imports only a few need be there.

Reads one JSON list of arguments per line; the first line of the answer has the options that there
are, each with its kind, every other one what the arguments were read as. Nothing is started.
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import sys
import types


class Absent(type):
    """A class that stands for anything of a package that is not here."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __iter__(cls):
        return iter(())

    def __or__(cls, other):
        return cls

    __ror__ = __or__


class Nothing(metaclass=Absent):
    """Takes any arguments, is a decorator, and may be derived from."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __init_subclass__(cls, **kwargs):
        pass

    def __class_getitem__(cls, item):
        return cls

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) else self


class Module(types.ModuleType):
    """Has every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what SGLang imports and is not here."""

    def __init__(self):
        self.tops = set()

    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        asking = frame.f_globals.get("__name__", "") if frame else ""
        top = name.partition(".")[0]
        if top == "sglang" or not (asking.startswith("sglang") or top in self.tops):
            return None
        self.tops.add(top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


class Kernels(Loader):
    """Hides SGLang's kernels, which need a GPU's compiler."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("sglang.kernels"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)


def kind(action):
    """How `serve.extra` has to be written for it."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "switch"
    if isinstance(action, argparse._StoreTrueAction):
        return "flag"
    if action.nargs == 0:
        return "deprecated"
    return "list" if action.nargs in {"*", "+"} else "value"


def main():
    sys.meta_path.insert(0, Kernels())
    sys.meta_path.append(Loader())
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    answer = {}
    for action in parser._actions:
        for option in action.option_strings:
            no = option.startswith("--no-") and kind(action) == "switch"
            if option.startswith("--") and not no:
                answer[option[2:]] = kind(action)
    sys.stdout.write(f"TOLD {json.dumps(answer)}\n")
    for line in sys.stdin:
        try:
            words = ConfigArgumentMerger(parser).merge_config_with_args(json.loads(line))
            answer = vars(parser.parse_args(words))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever it is, it is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(f"TOLD {json.dumps(answer, default=str)}\n")


main()
