"""A serving configuration of a target, as `render` makes it."""

from weightsmith.building.targets import all_targets
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.plan import ServingConfig
from weightsmith.stages.render import render

from tests.fakes.configs import LLAMA_8B, LLAMA_8B_BYTES, facts

L40S = {"gpu": "nvidia-l40s", "max_model_len": 8192, "max_num_seqs": 4}


def rendered(
    target, *, config=LLAMA_8B, weights=LLAMA_8B_BYTES, name="support", image="", **wishes
) -> ServingConfig:
    return render(
        target=all_targets()[target],
        name=name,
        version="1.0.0",
        model=facts(config),
        model_file="",
        weight_bytes=weights,
        options=ServeOptions(**wishes),
        image=image,
        made_from=(),
    )
