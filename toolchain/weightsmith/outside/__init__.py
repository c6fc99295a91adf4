"""What the ports are in the outside world: engines, processes, sandboxes, the store, hubs.

It may import `forward`, `models`, `oci`, `recipe` and `core`; only building/wiring.py and the
worker import it. Begin with core/ports.py, then store.py and local.py.
"""
