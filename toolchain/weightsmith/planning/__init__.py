"""What a build will do, worked out and checked before it does it."""
