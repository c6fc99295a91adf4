"""Plans a build and checks it before it starts."""
