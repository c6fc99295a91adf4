"""Questions, answers, scores and gates, and the pages that show them.

It may import the rooms that do the work, and those below. Begin with task.py and gate.py;
build_record.py is what a build leaves.
"""
