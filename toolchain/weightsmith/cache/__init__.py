"""The shared cache: a store's results, kept where other machines find them."""
