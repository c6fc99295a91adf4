"""What every room may use: values, jobs and ports; files, text, locks and errors.

It may import nothing of the package but itself. Begin with values.py and ports.py.
"""
