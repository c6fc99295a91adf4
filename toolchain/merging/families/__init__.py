"""The kinds of adapter weights we can merge: one file each, found by listing this folder."""
