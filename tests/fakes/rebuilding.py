"""An image that `build` made, to be made again from what it says of itself."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from weightsmith.api.commands.recipes import recipe_of_image
from weightsmith.core.ports import Progress, Silent
from weightsmith.core.values import (
    SAFETENSORS,
    AdapterSnapshot,
    Artifact,
    Checkpoint,
    Score,
    Snapshot,
    Sources,
    Tree,
)
from weightsmith.evaluating.results import RecipeTask, Result
from weightsmith.evaluating.task import Task
from weightsmith.models.reshard import Resharded
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, RegistryLocation
from weightsmith.outside.signer import open_signer
from weightsmith.provenance.attest import ImageInputs, ImageMaterials, evidence, public_recipe
from weightsmith.provenance.sealing import seal
from weightsmith.provenance.signing import Check, read_public_key
from weightsmith.recipe.file import RecipeFile, check_recipe, read_recipe
from weightsmith.recipe.schema import Suite
from weightsmith.serving.llamacpp import ENGINE

from tests.fakes.baking import make_key, push_base
from tests.fakes.images import tree_of
from tests.fakes.registry import FakeRegistry

COMMIT = "c" * 40


def tree(root: Path, **files: str) -> Tree:
    return tree_of(root, {k.replace("_json", ".json"): v.encode() for k, v in files.items()})


class Scene:
    def __init__(self, fake: FakeRegistry, client: Registry, folder: Path) -> None:
        self.client, self.folder, self.fake = client, folder, fake
        self.name = f"{fake.host}/team/app:1"
        self.key, self.public = make_key(folder)

    def publish(
        self,
        pin: str,
        source: str,
        twist: Callable[[dict[str, Any]], None] = lambda _: None,
        asked: Mapping[str, Any] = MappingProxyType({}),
        corpus: tuple[tuple[str, str], ...] = (),
        drafted: str | None = None,
        **more: str,
    ) -> None:
        """Push an image as `build` would, of two adapters; `twist` changes its stated recipe.

        `asked` are further facts of its one question, `corpus` its documents, `drafted` the pin of
        what drafts for it ("" of a folder), and `more` files that lie in both adapters, by name.
        """
        push_base(self.client, self.name, {}, {"models/x": b"1"})
        image = self.client.pull(Reference.parse(self.name), platform="linux/amd64")
        base = tree(self.folder / "base", config_json="{}")
        adapters = [tree(self.folder / f"a{n}", adapter_config_json=f"{n}", **more) for n in (0, 1)]
        merged = tree(self.folder / "merged", model="m")
        draft = tree(self.folder / "draft", config_json="{ }")
        both = tree(self.folder / "both", model="m", draft="d") if drafted is not None else merged
        recipe = check_recipe(
            {
                "name": "x",
                "base": {"source": source},
                "adapters": [{"source": str(self.folder / "a0"), "version": "v7", "weight": 0.5},
                             {"source": "./a1"}],
                "evaluate": {"data": str(self.folder / "eval.jsonl"), "max_drop": 0.2},
                "targets": ["vllm"],
                "merge": {"method": "linear"},
            },
            "test",
        )  # fmt: skip
        told = json.loads(json.dumps(public_recipe(recipe)))
        twist(told)
        item = {"prompt": "Capital of Ö?", "expected": ["A"], "answer": "A", "ok": True, **asked}
        score = Score(score=1.0, n=1, metric="contains", per_item=(item,))
        asked = RecipeTask(task=Task(items=(), corpus=corpus), settings=Suite(data="x"))
        artifact = Artifact(format=SAFETENSORS, tree=both)
        inputs = ImageInputs(
            artifact=artifact,
            engine=ENGINE,
            config=None,
            bases=(),
            base_name="",
            labels={},
            name="x",
            version="1",
            parameters={"recipe": told},
            sources=Sources(
                base=Snapshot(tree=base, source=source, pin=pin or base.digest, pinned=True),
                adapters=tuple(
                    AdapterSnapshot(snapshot=Snapshot(
                        tree=a, source="./a", pin=a.digest, pinned=True))
                    for a in adapters
                ),
                draft=None if drafted is None else Snapshot(
                    tree=draft, source="./d", pin=drafted or draft.digest, pinned=True),
            ),
            undrafted=None if drafted is None else Artifact(format=SAFETENSORS, tree=merged),
            checkpoint=Checkpoint(tree=merged),
            recipe=recipe,
        )  # fmt: skip
        made = ImageMaterials(
            inputs=inputs,
            split=Resharded(both, {}),
            base=None,
            image=image,
            results=(Result(task=asked, scores={"image": score}),),
        )
        place = RegistryLocation(self.client, Reference.parse(self.name))
        told = evidence(made, ())
        assert not any(str(self.folder).encode() in one.content for one in told.statements)
        for attachment in seal(told, image.manifest_blob, "x", open_signer(str(self.key))):
            place.attach(attachment)

    def again(
        self,
        base: str = "",
        key: Path | None = None,
        by: Check | None = None,
        progress: Progress | None = None,
        settings: Sequence[str] = (),
    ) -> RecipeFile:
        dist, told = self.folder / "dist", progress or Silent()
        check = by or read_public_key(key or self.public)
        path = recipe_of_image(self.name, base, check, dist, self.client, told, settings)
        return read_recipe(path, settings)
