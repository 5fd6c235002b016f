"""`alignyard import-gguf` and `alignyard export-fp8`: checkpoints in other formats."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from jobs.command import OUT, verb_app

app = verb_app()
OutputFolder = Annotated[Path, Argument(metavar="OUT", help="The folder to write.")]


@app.command("import-gguf")
def convert_gguf(file: Annotated[Path, Argument(metavar="FILE", help="The GGUF file.")], output: OutputFolder) -> int:
    """Dequantise a Llama GGUF file into a checkpoint folder for transformers and vLLM.

    The tokenizer and the chat template are included. Needs the extra `gguf`.

    \b
    Example:
      alignyard import-gguf SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
    """
    from pipeline.weights.gguf import import_gguf

    import_gguf(file, output)
    return 0


@app.command("export-fp8")
def write_fp8(
    checkpoint: Annotated[Path, Argument(metavar="CHECKPOINT", help="A folder that transformers loads.")],
    output: OutputFolder,
) -> int:
    """Write a checkpoint in the FP8 format of DeepSeek-V3's releases, which vLLM loads on GPUs.

    The projections of attention, MLPs and experts are stored in E4M3 with one scale for each block of 128 x 128; all
    other tensors stay as they are.

    \b
    Example:
      alignyard export-fp8 runs/demo/reason/hf models/reason-fp8
    """
    from pipeline.weights.fp8_export import export_fp8

    count = export_fp8(checkpoint, output)
    OUT.print(f"{output}: {count} weights in FP8", soft_wrap=True)
    return 0
