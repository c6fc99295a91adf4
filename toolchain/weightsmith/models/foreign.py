"""Adapters in the form of tools other than PEFT: what they are, and how to get a usable one.

Files are known by name, a file of any name by its tensors' names.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json

_HEADER = 1 << 16
"""Bytes of a file, of which the names of the first tensors are a part."""
_AS_BASE = "name the result as the base, without adapters"
_IMAGES = (
    "merge it into its image model with diffusers (load_lora_weights, then fuse_lora); "
    "weightsmith builds no image models"
)
_GATHER = (
    "let the training gather the weights and write them with PEFT's save_pretrained: "
    "fsdp_state_dict_type: FULL_STATE_DICT for FSDP, "
    "stage3_gather_16bit_weights_on_model_save for DeepSpeed"
)
_TOOLS = {
    "*adapters.safetensors": (
        "an adapter of mlx-lm",
        f"make a whole model of it with mlx_lm.fuse, and {_AS_BASE}",
    ),
    "lit_model.pth.lora": (
        "an adapter of LitGPT",
        (
            "make a whole model of it: litgpt merge_lora FOLDER; "
            f"litgpt convert_from_litgpt FOLDER OUT; then {_AS_BASE}"
        ),
    ),
    "*.nemo": (
        "a file of NeMo 1",
        (
            "convert it with NeMo's scripts/checkpoint_converters/lora_converters/"
            "convert_nemo_to_canonical.py --hf_format"
        ),
    ),
    "weights/adapter_metadata.json": (
        "an adapter of NeMo 2",
        (
            "convert it: from nemo.collections import llm; "
            "llm.peft.export_lora(lora_checkpoint_path=…, output_path=…)"
        ),
    ),
    "lora.safetensors": (
        "an adapter of mistral-finetune",
        (
            "make a whole model of it with mistral-finetune's utils.merge_lora, convert that with "
            f"convert_mistral_weights_to_hf.py of transformers 4, and {_AS_BASE}"
        ),
    ),
    "pytorch_lora_weights.*": ("an adapter of diffusers", _IMAGES),
    "adapter_model-*-of-*.safetensors": (
        "an adapter in several files",
        (
            'join them: python -c "import glob;from safetensors.torch import load_file,save_file;'
            "save_file({k:v for f in glob.glob('adapter_model-*') for k,v in load_file(f).items()},"
            "'adapter_model.safetensors',{'format':'pt'})\""
        ),
    ),
    "*.distcp": ("a checkpoint of FSDP in parts", _GATHER),
    "global_step*/*_model_states.pt": ("a checkpoint of DeepSpeed in parts", _GATHER),
}
"""Name of a file -> what has such files, and what to do with it."""


def refuse_foreign(root: Path) -> None:
    """Raise InputRefused if a folder without PEFT's two files has another tool's adapter."""
    config = root / "adapter_config.json"
    settings = read_json(config) if config.is_file() else {}
    own = settings.get("config")
    if "peft_type" not in settings and isinstance(own, dict):
        raise _refusal(root, "an adapter of AdapterHub's adapters", _of_adapterhub(own))
    for pattern, (what, hint) in _TOOLS.items():
        if any(root.glob(pattern)):
            raise _refusal(root, what, hint)
    if any(map(_is_of_kohya, sorted(root.glob("*.safetensors")))):
        raise _refusal(root, "an adapter in Kohya's format", _IMAGES)


def _is_of_kohya(path: Path) -> bool:
    """Return whether a file's header has the names that Kohya's scripts give to tensors."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
    except OSError:
        return False
    return any(name in header for name in (b'"lora_unet_', b'"lora_te', b".lora_down.weight"))


def _of_adapterhub(config: dict[str, object]) -> str:
    if config.get("architecture") != "lora":
        return "serve it with the adapters library: it adds layers to the model"
    return f"merge it with the adapters library (merge_adapter, save_pretrained), and {_AS_BASE}"


def _refusal(root: Path, what: str, hint: str) -> InputRefused:
    return InputRefused(f"{root} has {what}, which PEFT cannot load", hint=hint)
