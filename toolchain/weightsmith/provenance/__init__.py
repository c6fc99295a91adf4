"""Names, versions and statements about what was made from what."""
