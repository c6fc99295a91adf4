"""The public functions of `weightsmith`: each does the same as its command.

It may import `commands` and the rooms below; users import its names from `weightsmith` alone.
Begin with models.py; results.py has what the functions return.
"""
