"""`alignyard import-gguf` and `alignyard export`: checkpoints in other formats."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from jobs.command import OUT, verb_app
from jobs.serving import checkpoint_folder

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


@app.command("export")
def write_checkpoint(
    checkpoint: Annotated[
        str,
        Argument(
            metavar="CHECKPOINT", help="The folder of a checkpoint, a stage or a training state; a model of the hub."
        ),
    ],
    output: OutputFolder,
    dtype: Annotated[
        Literal["bf16", "fp32", "fp8"] | None,
        Option("--dtype", help="Precision of the weights. [default: the checkpoint's own; bf16 for one in FP8]"),
    ] = None,
) -> int:
    """Write a checkpoint for transformers and vLLM into a folder of its own, with the SHA-256 of each file.

    A tensor and an output file of 4 GiB are in memory at a time, of a training state a layer. fp8 is the format of
    DeepSeek-V3's releases, which vLLM loads on GPUs: the projections of attention, MLPs and experts in E4M3, with a
    scale for each block of 128 x 128; all other tensors stay as they are. `sha256sum -c SHA256SUMS` in the folder
    checks a copy of it.

    \b
    Examples:
      alignyard export runs/demo/grpo_preference models/demo
      alignyard export runs/demo/grpo_preference models/demo-fp8 --dtype fp8
      alignyard export models/deepseek-v3 models/deepseek-v3-bf16 --dtype bf16
      alignyard export runs/demo/grpo_preference/checkpoints/step-15 models/step-15
    """
    from pipeline.weights.export import export_checkpoint, export_state, is_training_state

    if is_training_state(Path(checkpoint)):
        folder = export_state(Path(checkpoint), output, dtype)
    else:
        folder = export_checkpoint(checkpoint_folder(checkpoint), output, dtype, sums=True)
    files = list(folder.glob("*.safetensors"))
    gib = sum(file.stat().st_size for file in files) / 2**30
    OUT.print(f"{output}: {len(files)} files of weights, {gib:.2f} GiB", soft_wrap=True)
    return 0
