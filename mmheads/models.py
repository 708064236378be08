"""Load stock Hugging Face models and processors."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available


def load_processor(model_id: str | Path) -> Any:
    """Load a model's stock processor; without its video part where torchvision is not installed.

    A text-only model has a tokenizer alone.

    Raises:
        OSError: There is neither at `model_id`.
    """
    settings, _ = ProcessorMixin.get_processor_dict(model_id)
    if is_torchvision_available() or "processor_class" not in settings:
        return AutoProcessor.from_pretrained(model_id)
    base = getattr(transformers, settings["processor_class"])
    return without_video(base).from_pretrained(model_id)


def without_video(base: type[ProcessorMixin]) -> type[Any]:
    """A processor class that takes images and text alone: video processors need torchvision.

    It keeps the name of `base`, which is what a saved processor is known by.
    """
    parts = [name for name in base.get_attributes() if name != "video_processor"]
    return type(
        base.__name__,
        (base,),
        {"get_attributes": classmethod(lambda cls: parts), "__module__": __name__},
    )
