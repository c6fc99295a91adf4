"""The shared cache: a store's results, kept where other machines find them.

It may import `provenance`, which signs results, and the rooms below. Begin with document.py: what
a cache says of one result; store.py puts a cache behind the local store.
"""
