"""References within JSON schemas of questions, which validating follows only where an answer leads.

What they lead to is defined in JSON Schema 2020-12, section 8:
https://json-schema.org/draft/2020-12/json-schema-core
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from referencing import Resource

    from weightsmith.core.values import Json


def reference_error(schema: Json) -> str:
    """Return what is wrong with the references of a valid schema, "" if nothing is.

    Each must lead to a place in the schema or to a published dialect, as nothing is fetched, and
    a chain of them must have an end.
    """
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    root: Resource[Json] = DRAFT202012.detect(schema).create_resource(schema)
    todo = [(root, REGISTRY.resolver_with_root(root))]
    while todo:
        part, resolver = todo.pop()
        contents, place, seen = part.contents, resolver, set[int]()
        while isinstance(contents, dict) and isinstance(ref := contents.get("$ref"), str):
            if id(contents) in seen:
                return f"reference {ref[:60]!r} leads back to itself"
            seen.add(id(contents))
            try:
                found = place.lookup(ref)
            except (Unresolvable, ValueError):
                return f"reference {ref[:60]!r} leads nowhere"
            contents, place = found.contents, found.resolver
        todo += [(each, resolver.in_subresource(each)) for each in part.subresources()]
    return ""
