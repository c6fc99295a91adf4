"""The public interface behind the names of `weightsmith`: each does what its command does."""
