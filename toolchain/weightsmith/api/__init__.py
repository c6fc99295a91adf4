"""The public functions of `weightsmith`: each does the same as its command.

Both do what `commands/` has. It may import `fleets` and the rooms below; users import its names
from `weightsmith` alone. Begin with models.py, or for a command with commands/requests.py.
"""
