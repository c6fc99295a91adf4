"""What each command does that is not a build: one stage at a time, on folders and references.

It may import `fleets` and the rooms below; both interfaces call it with the same values. Begin
with requests.py, which says what each command is asked.
"""
