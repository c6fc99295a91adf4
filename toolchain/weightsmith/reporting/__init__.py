"""What build.json says, made ready to be shown: pure functions from facts to views."""
