"""Follows the pages of a registry's lists (RFC 8288)."""

from __future__ import annotations

import re

from weightsmith.oci.replies import RegistryReply
from weightsmith.oci.session import RegistrySession


def next_page(session: RegistrySession, reply: RegistryReply) -> str:
    """Return the next page's URL, or empty."""
    # Possessive: the search would take minutes for a hundred thousand "<".
    found = re.search(r'<([^<>]++)>\s*+;\s*+rel="?next"?', reply.headers.get("link", ""))
    return session.follow(reply.url, found[1]) if found else ""
