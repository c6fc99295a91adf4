"""Many builds of one recipe: which there are, what they share, where they run, what came out."""
